"""Sums of a validation: those of a training step, and the counts that they are divided by once all batches are added."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def with_counts(sums: Mapping[str, Tensor], counts: Mapping[str, int | Tensor]) -> dict[str, Tensor]:
    """Sums in float64, and the counts of ``Task.counts`` under names of their own."""
    own = {f"{name} count": torch.as_tensor(count) for name, count in counts.items()}
    return {**{name: value.double() for name, value in sums.items()}, **own}


def means_of(sums: Mapping[str, float], units: Mapping[str, str]) -> dict[str, float]:
    """The mean of each sum that ``units`` names the count of; 0 for a count of 0."""
    return {name: sums[name] / max(sums[f"{unit} count"], 1) for name, unit in units.items()}
