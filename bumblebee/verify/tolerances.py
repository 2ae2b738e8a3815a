"""How far arithmetic in a dtype may be from the formula in fp64, and two ways to measure it.

The unit is the spacing of a dtype's numbers at 1: 2^-7 in bf16, 2^-10 in fp16. Fused kernels read and write these and add up
in fp32, so that a result is rounded a few times, by half a unit each. In fp32, adding up itself is rounded, hundreds of times:
there the unit is taken as 32 spacings, 2^-18. Of many results the worst may be off by 4 units, a gradient as a whole by 2.
Rounding goes up as often as down, so what all results have in common, a scale or a mean, may be off by a quarter of a unit
only, 0.2 % in bf16. Measured on CPUs, with all kernels and dtypes: less than half of each bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORST, WHOLE, COMMON = 4.0, 2.0, 0.25  # units


def unit(dtype: torch.dtype) -> float:
    """What the three bounds are multiples of."""
    return torch.finfo(dtype).eps * (32 if dtype == torch.float32 else 1)


def distance(values: Tensor, wanted: Tensor) -> float:
    """The length of the difference as a share of the length of what is wanted."""
    return ((values.double() - wanted).norm() / wanted.norm()).item()


def scale_error(values: Tensor, wanted: Tensor) -> float:
    """By what share the values are too large or too small as a whole."""
    return abs(((values.double() * wanted).sum() / wanted.square().sum()).item() - 1)
