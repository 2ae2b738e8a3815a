"""Plain implementations of the attention operators for GPUs, so that their callers run on a CPU.

Shapes: N tokens of the flattened batch, H query heads, K key heads, D.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor


def weights(q: Tensor, k: Tensor, ends: Tensor, window: list[int], ends_k: Tensor | None = None) -> Tensor:
    """Attention weights (H, N, S) of a flattened batch, whose query heads share keys in groups.

    The last query of a sequence is at its last key.
    """
    ends_k = ends if ends_k is None else ends_k
    number, number_k = (torch.repeat_interleave(torch.arange(len(e) - 1), e.diff()) for e in (ends, ends_k))
    at, at_k = torch.arange(len(q)) + (ends_k - ends)[1:][number], torch.arange(len(k))
    visible = (number[:, None] == number_k) & (at_k <= at[:, None])
    if window[0] >= 0:
        visible &= at_k >= at[:, None] - window[0]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) / q.shape[2] ** 0.5
    return scores.masked_fill(~visible, float("-inf")).softmax(-1)


def forward(q, k, v, ends, ends_k, longest, longest_k, causal, scale, window, enable_gqa, *others):
    """What ``varlen_attn`` promises, and what it requires."""
    assert ends.dtype == ends_k.dtype == torch.int32 and ends[-1] == len(q) and ends_k[-1] == len(k)
    assert longest == int(ends.diff().max()) and longest_k == int(ends_k.diff().max()) and scale is None and window[1] == 0
    assert causal == (window == [-1, 0]) and enable_gqa == (q.shape[1] != k.shape[1])
    p = weights(q, k, ends, window, ends_k)
    out = torch.einsum("hqk,khd->qhd", p, v.repeat_interleave(q.shape[1] // v.shape[1], 1))
    return out.contiguous(), q.new_empty(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def backward(grad, q, k, v, out, lse, ends, ends_k, longest, longest_k, causal, rng_state, scale, window):
    """The gradients, written out: autograd does not record inside an operator."""
    groups = q.shape[1] // k.shape[1]
    p, scale = weights(q, k, ends, window), q.shape[2] ** -0.5
    of_p = torch.einsum("qhd,khd->hqk", grad, v.repeat_interleave(groups, 1))
    of_scores = p * (of_p - (p * of_p).sum(-1, keepdim=True)) * scale
    of_q = torch.einsum("hqk,khd->qhd", of_scores, k.repeat_interleave(groups, 1))
    of_k, of_v = torch.einsum("hqk,qhd->khd", of_scores, q), torch.einsum("hqk,qhd->khd", p, grad)
    of_k, of_v = (x.unflatten(1, (-1, groups)).sum(2) for x in (of_k, of_v))
    return of_q.contiguous(), of_k.contiguous(), of_v.contiguous()


def register_varlen() -> None:
    """Give torch's ``varlen_attn`` operators these implementations on the CPU."""
    from torch.nn.attention import varlen as operators

    operators._varlen_attn.register_kernel("cpu")(forward)
    operators._varlen_attn_backward.register_kernel("cpu")(backward)


@torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())
def _flash_forward(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, left: int) -> Tensor:
    assert longest == int(ends.diff().max())
    out = torch.einsum("hqk,khd->qhd", weights(q, k, ends, [left, 0]), v.repeat_interleave(q.shape[1] // v.shape[1], 1))
    return out.contiguous()


@torch.library.custom_op("flash_attn::_flash_attn_varlen_backward", mutates_args=())
def _flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, left: int) -> tuple[Tensor, Tensor, Tensor]:
    return backward(grad, q, k, v, None, None, ends, ends, 0, 0, True, None, None, [left, 0])


_flash_forward.register_fake(lambda q, k, v, ends, longest, left: q.new_empty(q.shape))
_flash_backward.register_fake(lambda grad, q, k, v, ends, left: tuple(x.new_empty(x.shape) for x in (q, k, v)))
_flash_forward.register_autograd(
    lambda ctx, grad: (*_flash_backward(grad, *ctx.saved_tensors, ctx.left), None, None, None),
    setup_context=lambda ctx, inputs, output: (ctx.save_for_backward(*inputs[:4]), setattr(ctx, "left", inputs[5])),
)


def _flash_attn_varlen(q, k, v, ends, ends_k, longest, longest_k, causal, window_size, dropout_p, deterministic):
    assert causal and not dropout_p and ends is ends_k and longest == longest_k
    return _flash_forward(q, k, v, ends, longest, window_size[0])


def _flash_attn(q, k, v, causal, window_size, dropout_p, deterministic):
    rows, length = q.shape[:2]
    ends = torch.arange(rows + 1, dtype=torch.int32) * length
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return _flash_attn_varlen(*flat, ends, ends, length, length, causal, window_size, dropout_p, deterministic).unflatten(
        0, (rows, length)
    )


FLASH_ATTN = ModuleType("flash_attn")  # the package
FLASH_ATTN.flash_attn_func, FLASH_ATTN.flash_attn_varlen_func = _flash_attn, _flash_attn_varlen  # type: ignore[attr-defined]
