"""Compiled blocks at ZeRO stage 3: their weights are gathered before the compiled graph begins and released after it.

DeepSpeed gathers the weights of each module in hooks, which torch.compile cannot trace: a graph would break at every linear
layer. As a "leaf" of ZeRO-3, a block has hooks of its own only, for all weights inside.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from bumblebee.nn.block_forward import is_compiled


def gather_compiled_blocks_whole(deepspeed: ModuleType, model: nn.Module) -> None:
    """Make each compiled block a leaf. Call it before ``deepspeed.initialize``, whose hooks must run after ours."""
    for module in model.modules():
        if is_compiled(module):
            deepspeed.utils.set_z3_leaf_module(module, True)
            module.register_forward_pre_hook(_CheckUse())


class _CheckUse:
    """Forward pre-hook of a leaf, which sees to what DeepSpeed relies on.

    It reduces the gradients of all weights inside when the gradient of the block's input is known. So the input needs one, also
    that of the first block if the embedding is frozen. And a second use before the backward pass would be reduced twice.
    """

    def __init__(self) -> None:
        self.awaits_backward = False

    def __call__(self, block: nn.Module, args: tuple[object, ...]) -> tuple[object, ...] | None:
        """The arguments, of which the first requires a gradient.

        Raises:
            ValueError: the backward pass of an earlier use has not run yet.
        """
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not torch.is_grad_enabled() or not any(p.requires_grad for p in block.parameters()):
            return None
        if self.awaits_backward:
            raise ValueError(
                "task.transforms: Compile at ZeRO stage 3 supports one use of a block per backward pass, and this model or task"
                " uses one twice; set trainer.zero_stage to 2 or less, or remove Compile"
            )
        x = x if x.requires_grad else x.detach().requires_grad_()
        x.register_hook(self._on_gradient)
        self.awaits_backward = True
        return x, *args[1:]

    def _on_gradient(self, gradient: Tensor) -> None:
        self.awaits_backward = False
