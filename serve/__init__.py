"""Serving a model folder: LitServe hosts the generator, OpenAI's clients and a chat page talk to it."""
