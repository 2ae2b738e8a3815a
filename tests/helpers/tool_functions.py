"""Tools that a model may call."""

from __future__ import annotations

import os
import time


def add(a: int, b: int) -> int:
    """Add.

    Args:
        a: first number.
        b: second number.
    """
    return a + b


def by_name(action: str, seconds: float = 60.0) -> str:
    """Do what the action says."""
    if action == "raise":
        raise KeyError("no such key")
    if action == "sleep":
        time.sleep(seconds)
    if action == "exit":
        os._exit(7)
    return f"<|im_end|> {action}"
