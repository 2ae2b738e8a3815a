"""The chat in a terminal: with a model folder in this process, or with a server."""
