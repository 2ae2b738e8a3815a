"""Parameters that ZeRO-3 shards over the ranks: their full shape, and the shard that this rank holds.

DeepSpeed notes both on the parameter itself, so these functions take any tensor and import nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


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


def iter_local_weights(model: nn.Module, rank: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, weights) of each trainable parameter: the whole parameter, or this rank's shard without padding.

    Leaves out shards that ZeRO-3 has offloaded to NVMe and those that it stores quantized.
    """
    for name, parameter in model.named_parameters():
        weights = parameter.detach()
        if (shard := local_shard(parameter)) is not None:
            if shard.status.name != "AVAILABLE":  # type: ignore[attr-defined]
                continue
            weights = shard.detach()[: max(0, full_numel(parameter) - rank * shard.numel())]
        if parameter.requires_grad and weights.is_floating_point() and weights.numel():
            yield name, weights
