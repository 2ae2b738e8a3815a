"""`bumblebee chat`: a terminal chat with a model folder in this process, or with an OpenAI-compatible server."""
