"""How numbers, times and suggestions are written for people."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def number(value: float) -> str:
    """Whole numbers in groups of three digits; others with four decimals where these say something, else three digits."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if value == 0 or 0.01 <= abs(value) < 10_000 else f"{value:.3g}"


def short(count: float) -> str:
    """A large count in three digits and a unit: 494 M."""
    for unit in ("", " k", " M", " G"):
        if abs(count) < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:,.3g} T"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def span(seconds: float) -> str:
    """A time that is known roughly, in its largest unit: 12 min."""
    for unit, size, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 72)):
        if seconds < most * size:
            return f"{seconds / size:.{2 if unit == 's' else 3}g} {unit}"
    return f"{seconds / 86400:,.0f} days"


def hint(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)", or nothing."""
    return did_you_mean(difflib.get_close_matches(name, list(known), n=2))


def did_you_mean(near: list[str]) -> str:
    """``hint`` for names that have been chosen already."""
    return f" (did you mean {' or '.join(repr(name) for name in near)}?)" if near else ""
