"""Gather the full weights of a model under ZeRO, one parameter at a time or all together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from bumblebee.distributed.deepspeed.optimizer_types import ZeroOptimizer


def iter_full_tensors(model: nn.Module, stage: int, select: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Yield (key, whole tensor) for every selected key of the state dict. Collective: all ranks iterate together.

    Args:
        model: the module that DeepSpeed trains.
        stage: of ZeRO; at stage 3 each parameter is gathered and copied to the CPU.
        select: whether a key is yielded.
    """
    from deepspeed.runtime.zero import GatheredParameters

    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, tensor in model.state_dict(keep_vars=True).items():
        if not select(key):
            continue
        if key in parameters and stage == 3:
            with GatheredParameters([parameters[key]]):
                yield key, tensor.detach().cpu().clone()
        else:
            yield key, tensor.detach()


@contextmanager
def gathered_model(model: nn.Module, optimizer: ZeroOptimizer) -> Iterator[nn.Module]:
    """Gather all weights of a stage-3 model on every rank, and remove the hooks that gather and release them. Collective.

    Inside, a rank may call the model alone, or not at all.

    Args:
        model: the module that DeepSpeed trains.
        optimizer: what ``deepspeed.initialize`` returned for it.
    """
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(model.parameters())), without_hooks(optimizer):
        yield model


@contextmanager
def without_hooks(optimizer: ZeroOptimizer) -> Iterator[None]:
    """Remove the hooks by which DeepSpeed gathers and releases weights at stage 3, and restore them at the end."""
    offload = optimizer.parameter_offload
    handles = [*offload.forward_hooks, *offload.backward_hooks, offload.fwd_pre_hook]
    tables = {id(table): table for handle in handles if (table := handle.hooks_dict_ref()) is not None}
    before = [(table, dict(table)) for table in tables.values()]
    for handle in handles:
        if (table := handle.hooks_dict_ref()) is not None:
            table.pop(handle.id, None)
    try:
        yield
    finally:
        for table, hooks in before:  # in their old order
            table.clear()
            table.update(hooks)
