"""The base class of all models, and loading: which class reads a model folder."""
