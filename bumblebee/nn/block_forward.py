"""What transforms do to the forward of a transformer block: recompute it in the backward pass, compile it, or both.

It replaces the block's ``forward`` rather than its call, for two reasons. DeepSpeed's hooks at ZeRO stage 3, which gather and
release weights, stay outside of the compiled graph, where they belong: torch.compile cannot trace them. And the recomputation
is inside of the graph, where the compiler knows what it may recompute; around a compiled block it would run the block twice.
A forward pass with a KV cache is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from bumblebee.nn.batch_invariant import is_batch_invariant, keeping_mode

# Operators whose results are kept while the rest of a block is recomputed: the attention itself, not its projections.
ATTENTION_OPERATORS = (
    "aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward", "flash_attn_3::fwd",
    "torch_attn::_varlen_attn",
)  # fmt: skip
_CACHES = ("cache", "past_key_values")  # names of the argument, here and in transformers


class BlockForward:
    """The forward of a block, with what transforms have added to it.

    Attributes:
        recompute: recompute the activations in the backward pass instead of storing them.
        keep_attention: keep the results of attention and recompute the rest.
    """

    def __init__(self, block: nn.Module) -> None:
        self.plain: Callable[..., Tensor] = block.forward
        self.recompute = self.keep_attention = False
        self.mode: str | None = None
        self._compiled: Callable[..., Tensor] | None = None

    @classmethod
    def of(cls, block: nn.Module) -> BlockForward:
        """That of a block, which gets one if it has none yet."""
        if not isinstance(block.forward, cls):
            block.forward = cls(block)
        return block.forward

    def compile(self, mode: str) -> None:
        """Compile the block at its next call. Blocks of the same structure share one graph."""
        self.mode, self._compiled = mode, None

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        """The block's forward."""
        if any(kwargs.get(name) is not None for name in _CACHES) or len(args) > 3 and args[3] is not None:
            return self.plain(*args, **kwargs)
        if self.mode is not None and is_batch_invariant():
            raise ValueError("batch_invariant: does not support compiled blocks; remove the transform that compiles them")
        if self.mode is None:
            return _forward(self.plain, self.recompute, self.keep_attention, *args, **kwargs)
        if self._compiled is None:
            _configure_dynamo()
            self._compiled = torch.compile(_forward, mode=self.mode)
        return self._compiled(self.plain, self.recompute, self.keep_attention, *args, **kwargs)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_compiled": None}  # a copy of the block compiles its own


def is_compiled(block: nn.Module) -> bool:
    """Whether a block's forward is compiled."""
    return isinstance(block.forward, BlockForward) and block.forward.mode is not None


def _forward(plain: Callable[..., Tensor], recompute: bool, keep_attention: bool, *args: object, **kwargs: object) -> Tensor:
    if not recompute or not torch.is_grad_enabled():
        return plain(*args, **kwargs)
    plain = keeping_mode(plain)
    if keep_attention:
        return checkpoint(plain, *args, use_reentrant=False, context_fn=_contexts, **kwargs)  # type: ignore[arg-type]
    return checkpoint(plain, *args, use_reentrant=False, **kwargs)  # type: ignore[arg-type]


def _configure_dynamo() -> None:
    config = torch._dynamo.config
    # A recomputed block appends the outputs of its router in the forward pass only, as it does without torch.compile.
    config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    # All blocks of a process share the graphs of one function: kinds of layers, packed rows or not, training and validation.
    # Beyond the limit, 8 by default, torch would go on without compiling.
    config.recompile_limit = max(config.recompile_limit, 64)


def _policy(context: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    name = operator.name().partition(".")[0] if isinstance(operator, torch._ops.OpOverload) else ""
    return CheckpointPolicy.MUST_SAVE if name in ATTENTION_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


_contexts = partial(create_selective_checkpoint_contexts, _policy)
