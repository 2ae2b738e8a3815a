"""Attention of training: causal, over packed documents, and in a sliding window, with grouped-query heads.

    python -m benchmarks.kernels.attention [--device cuda] [--dtype bf16] [--sizes BxTxHxKxD ...]

B rows of T tokens, H query heads on K key-value heads of width D. FLOPs are those of the pairs that are attended to.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.harness import Case, Variant, dimensions, main
from bumblebee.nn import attention_kernels as kernels
from bumblebee.nn.attention_kernels import AttentionMask

SIZES = {"cpu": ["2x512x8x2x64"], "cuda": ["8x2048x32x8x128"]}
DOCUMENTS, WINDOW = 4, 4  # documents in a row; a window is a quarter of it


def cases(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Case]:
    rows, length, heads, kv_heads, width = dimensions(size, "BxTxHxKxD")
    q = torch.randn(rows, length, heads, width, device=device, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(rows, length, kv_heads, width, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    position_ids = (torch.arange(length, device=device) % (length // DOCUMENTS)).expand(rows, -1)
    packed, window = AttentionMask.packed(position_ids), length // WINDOW
    for name, mask, sides in (("causal", AttentionMask(), None), ("packed", packed, None), ("window", AttentionMask(), window)):
        visible = mask.dense(length, length, device, sides)
        pairs = float(visible.sum()) * (rows if visible.shape[0] == 1 else 1)
        variants, missing = _variants(mask, sides, visible, device, dtype)
        flops = 4.0 * pairs * heads * width
        yield Case(f"{name} {size}", (q, k, v), partial(_formula, visible=visible), variants, missing, flops, backward_work=3.5)


def _formula(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """A head at a time, with the scores of all pairs."""
    heads = []
    for head in range(q.shape[2]):
        shared = head * k.shape[2] // q.shape[2]
        scores = q[:, :, head] @ k[:, :, shared].mT / q.shape[-1] ** 0.5
        heads.append(scores.masked_fill(~visible[:, 0], float("-inf")).softmax(-1) @ v[:, :, shared])
    return torch.stack(heads, 2)


def _variants(
    mask: AttentionMask, window: int | None, visible: Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Variant], dict[str, str]]:
    """The project's kernels, each backend of SDPA, and FlexAttention."""
    missing = {name: "; ".join(reasons) for name in kernels.KERNELS if (reasons := kernels.problems(name, dtype))}
    variants: dict[str, Variant] = {
        name: partial(kernel, mask=mask, window=window) for name, kernel in kernels.KERNELS.items() if name not in missing
    }
    for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
        if device.type == "cuda":
            variants[f"sdpa {backend.lower()}"] = partial(
                _backend, name=backend, visible=visible, causal=mask.is_causal and not window
            )
        else:
            missing[f"sdpa {backend.lower()}"] = "a backend of GPUs; the CPU has one fused kernel, which sdpa selects"
    if device.type == "cuda":
        variants["flex_attention"] = _flex(visible)
    else:
        missing["flex_attention"] = "torch has no backward pass of it on a CPU"
    return variants, missing


def _backend(q: Tensor, k: Tensor, v: Tensor, name: str, visible: Tensor, causal: bool) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mask = None if causal else visible
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if mask is not None:  # no fused kernel has both a mask and grouped heads
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    with sdpa_kernel(getattr(SDPBackend, name)):
        grouped = k.shape[1] != q.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def _flex(visible: Tensor) -> Variant:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows, length = visible.shape[0], visible.shape[-1]

    def attends(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible[b if rows > 1 else 0, 0, query, key]

    blocks = create_block_mask(attends, rows if rows > 1 else None, None, length, length, device=visible.device)
    run = torch.compile(flex_attention, dynamic=False)

    def variant(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return run(q, k, v, block_mask=blocks, enable_gqa=True).transpose(1, 2)

    return variant


if __name__ == "__main__":
    sys.exit(main("attention (rows x tokens x heads x key-value heads x width)", cases, SIZES))
