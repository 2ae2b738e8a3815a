"""Forward passes at ZeRO stage 3 with the weights of one transformer block at a time, however often each rank calls the model.

Ranks gather weights together, but one may have fewer completions to sample than another, or shorter ones. So a rank announces
each forward pass before it begins, and a rank that is done takes part in the others' gathers until all are done:

    rank 0    announce, gather and run blocks    announce, gather and run blocks    done
    rank 1    announce, gather and run blocks    done, gather blocks                done

Weights outside of the blocks (embedding, final norm and head) stay gathered from the first pass to the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from bumblebee.distributed import process_group
from bumblebee.distributed.deepspeed.gathering import without_hooks
from bumblebee.distributed.deepspeed.optimizer_types import ZeroOptimizer


@contextmanager
def gathered_by_layer(model: nn.Module, optimizer: ZeroOptimizer) -> Iterator[nn.Module]:
    """Gather the weights of each block of a stage-3 model before it runs, and release them after it. Collective.

    Inside, a rank may call the model any number of times, without gradients. No other collective may be called there.

    Args:
        model: the module that DeepSpeed trains, a ``LanguageModel``.
        optimizer: what ``deepspeed.initialize`` returned for it.

    Raises:
        ValueError: the model calls its blocks in another order than it lists them.
    """
    blocks: Sequence[nn.Module] = model.blocks  # type: ignore[assignment]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    with without_hooks(optimizer), _gathered(outside):
        walk = _BlockWalk(model, blocks)
        try:
            yield model
        except Exception:
            if not walk.in_forward:  # else the other ranks are in the middle of it too, and lose this one
                walk.join_others()
            raise
        else:
            walk.join_others()
        finally:
            walk.close()


def _gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters)


class _BlockWalk:
    """Hooks that gather each block's weights before it runs and release them after it.

    Args:
        model: announces its forward passes.
        blocks: its blocks in the order in which it calls them; one may occur several times.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self._blocks, self._at = blocks, 0
        self._held: AbstractContextManager[None] | None = None  # the weights of the block that runs
        self.in_forward = False
        self._handles = [model.register_forward_pre_hook(self._begin), model.register_forward_hook(self._end)]
        for block in dict.fromkeys(blocks):
            self._handles.append(block.register_forward_pre_hook(self._before))
            self._handles.append(block.register_forward_hook(self._after))

    def join_others(self) -> None:
        """Take part in the gathers of ranks that still call the model, until no rank does. Collective."""
        while process_group.any_rank(False):
            for block in self._blocks:
                self._gather(block)
                self._release()

    def close(self) -> None:
        """Remove the hooks; release the weights of a block that has failed."""
        for handle in self._handles:
            handle.remove()
        self._release()

    def _begin(self, model: nn.Module, args: tuple[object, ...]) -> None:
        self.in_forward, self._at = True, 0
        process_group.any_rank(True)

    def _end(self, model: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        if self._at != len(self._blocks):
            raise ValueError(f"{_ORDER}: it has {len(self._blocks)} blocks and has called {self._at}")
        self.in_forward = False

    def _before(self, block: nn.Module, args: tuple[object, ...]) -> None:
        if self._at == len(self._blocks) or self._blocks[self._at] is not block:
            raise ValueError(f"{_ORDER}: block {self._at} is another one than has been called")
        self._at += 1
        self._gather(block)

    def _after(self, block: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        self._release()

    def _gather(self, block: nn.Module) -> None:
        gathered = _gathered(list(block.parameters()))
        with torch.inference_mode(False), torch.no_grad():  # DeepSpeed keeps the tensors beyond the forward pass
            gathered.__enter__()
        self._held = gathered

    def _release(self) -> None:
        gathered, self._held = self._held, None
        if gathered is not None:
            with torch.inference_mode(False), torch.no_grad():
                gathered.__exit__(None, None, None)


_ORDER = "task.gather_weights: layers needs a model that calls each block once, in their order; set it to all"
