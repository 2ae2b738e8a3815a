"""Parameters that ZeRO-3 shards over the ranks: their full shape, and the shard that this rank holds.

DeepSpeed notes both on the parameter itself, so these functions take any tensor and import nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 shards the parameter; outside of its module's forward it may then be empty."""
    return hasattr(parameter, "ds_tensor")


def local_shard(parameter: Tensor) -> Tensor | None:
    """This rank's shard, flat; the last ranks' may end in padding. None if the parameter is not sharded."""
    return getattr(parameter, "ds_tensor", None)


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_numel(parameter: Tensor) -> int:
    """The number of elements of the whole parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
