"""Tasks: a model and its loss."""
