"""Metrics of a run: reduced over ranks, formatted, logged to JSON Lines, and followed by callbacks."""
