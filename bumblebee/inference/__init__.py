"""Generating text: usable without any server."""
