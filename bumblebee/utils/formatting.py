"""Formatting of numbers, durations and "did you mean" suggestions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


def number(value: float) -> str:
    """Format an integer as 1,234,567 and a float with four decimals, or three significant digits if very small or large."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if value == 0 or 0.01 <= abs(value) < 10_000 else f"{value:.3g}"


def format_metric(name: str, value: float) -> str:
    """Format the value of a metric: a learning rate with three significant digits, 5e-06, everything else as ``number``."""
    return f"{value:.3g}" if name == "lr" else number(value)


def plural(count: int, noun: str) -> str:
    """Format a count of things: 1 document, 1,234 documents."""
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"


def printable(text: str) -> str:
    """Text for a terminal, on one line: control characters, which may move the cursor, become dots."""
    return "".join(character if character.isprintable() else "·" for character in text)


def short(count: float) -> str:
    """Format a count with three significant digits and a unit: 494 M."""
    for unit in ("", " k", " M", " G"):
        if abs(count) < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:,.3g} T"


def duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def span(seconds: float) -> str:
    """Format an approximate duration in its largest unit: 12 min."""
    for unit, size, limit in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 72)):
        if seconds < limit * size:
            return f"{seconds / size:.{2 if unit == 's' else 3}g} {unit}"
    return f"{seconds / 86400:,.0f} days"


def system_error(error: OSError) -> str:
    """Describe an operating system error: "file not found: FILE", "folder not found: FOLDER" or "FILE: reason"."""
    if error.filename is None or not error.strerror:
        return str(error)
    path = Path(str(error.filename))
    if isinstance(error, FileNotFoundError):
        return f"file not found: {path}" if path.parent.is_dir() else f"folder not found: {path.parent}"
    return f"{path}: {error.strerror}"


def hint(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the known names closest to a name, or ""."""
    return did_you_mean(difflib.get_close_matches(name, list(known), n=2))


def did_you_mean(near: list[str]) -> str:
    """Return " (did you mean 'x' or 'y'?)", or "" for an empty list."""
    return f" (did you mean {' or '.join(repr(name) for name in near)}?)" if near else ""
