"""How numbers, metrics and times are written for people. No callback: several of them use it."""

from __future__ import annotations

import sys
from collections.abc import Mapping


def say(text: str) -> None:
    """Print in the middle of a run: above the progress bar, where there is one."""
    from tqdm import tqdm

    tqdm.write(text)
    sys.stdout.flush()


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


def sentence(metrics: Mapping[str, float]) -> str:
    """Names and values on one line."""
    return " · ".join(f"{name} {number(value)}" for name, value in metrics.items())


def validation_sentence(step: int, metrics: Mapping[str, float]) -> str:
    """What a validation gave, on one line."""
    return f"validation at step {step:,}: " + sentence(without_prefix(metrics))


def without_prefix(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a validation, whose names all begin with ``validation_``, under their short names."""
    return {name.removeprefix("validation_"): value for name, value in metrics.items()}
