"""Parameters that look as DeepSpeed leaves them under ZeRO-3, without DeepSpeed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fake_shard(parameter: nn.Parameter, ranks: int) -> Tensor:
    """Mark a parameter as sharded over so many ranks, and return its local shard, filled with NaN."""
    parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
    parameter.ds_tensor = torch.full((-(-parameter.numel() // ranks),), float("nan"))  # type: ignore[attr-defined]
    return parameter.ds_tensor  # type: ignore[attr-defined, no-any-return]
