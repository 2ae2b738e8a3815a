"""Evaluation of trained models on the data of a recipe."""
