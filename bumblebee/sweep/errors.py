"""SweepError: a sweep that cannot start or go on because of what the user wrote."""

from __future__ import annotations


class SweepError(ValueError):
    """The message is complete: it names the file, the key and the value."""
