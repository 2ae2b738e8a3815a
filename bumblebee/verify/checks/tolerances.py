"""How far arithmetic in a dtype may deviate from the formula in fp64, and ways to measure it.

The unit is the machine epsilon of the dtype: 2^-7 in bf16, 2^-10 in fp16. Fused kernels read and write the dtype and accumulate
in fp32, so that a result is rounded a few times, by half a unit each. In fp32 the accumulation itself is rounded hundreds of
times: there the unit is 32 epsilons, 2^-18. The worst of many values may deviate by 4 units, a whole gradient by 2.
Rounding errors cancel, so that a common factor, such as a scale or a mean, may deviate by a quarter of a unit only (0.2 % in
bf16). On CPUs all kernels and dtypes stay below half of each bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

WORST, WHOLE, COMMON = 4.0, 2.0, 0.25  # units


def rounding_unit(dtype: torch.dtype) -> float:
    """The error that the three bounds are multiples of."""
    return torch.finfo(dtype).eps * (32 if dtype == torch.float32 else 1)


def relative_error(values: Tensor, expected: Tensor) -> float:
    """The norm of the difference relative to the norm of the expected tensor."""
    return ((values.double() - expected).norm() / expected.norm()).item()


def worst_vector_error(values: Tensor, expected: Tensor) -> float:
    """The largest relative error of a vector along the last dimension."""
    return ((values.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def scale_error(values: Tensor, expected: Tensor) -> float:
    """The relative error of the scale of all values: their least-squares factor minus 1."""
    return abs(((values.double() * expected).sum() / expected.square().sum()).item() - 1)


def movement_error(
    initial: Mapping[str, Tensor], weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: list[str]
) -> float:
    """Distance between weights and expected weights, relative to the expected movement from the initial weights."""
    error, movement = (
        math.sqrt(sum(float((a[name].double() - b[name]).square().sum()) for name in names))
        for a, b in ((weights, expected), (expected, initial))
    )
    return error / movement
