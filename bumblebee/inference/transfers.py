"""Transfers between the host and a GPU in an engine step: none of them makes the host wait, except one read-back per step.

``torch.tensor(values, device="cuda")`` and ``.to("cuda")`` wait until the GPU has done all earlier work; a copy with
``non_blocking`` does not. Reading a value back always waits, so everything that a step has to know travels together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence[object], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of host values on a device, without waiting for it."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def upload_lists(lists: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Several lists of integers as int64 tensors on a device, in one copy."""
    flat = upload([value for values in lists for value in values], device, torch.int64)
    return list(flat.split([len(values) for values in lists]))


def read_back(*groups: Sequence[Tensor]) -> list[list[list[float]]]:
    """The values of tensors on one device, each flattened, in one copy: the only wait of an engine step.

    They travel in fp64, which holds ids, flags and fp32 numbers exactly.
    """
    tensors = [tensor for group in groups for tensor in group]
    if not tensors:
        return [[] for _ in groups]
    values, at, result = torch.cat([tensor.flatten().double() for tensor in tensors]).tolist(), 0, []
    for group in groups:
        result.append([values[(begin := at) : (at := begin + tensor.numel())] for tensor in group])
    return result
