"""Tokenizer and chat templates."""
