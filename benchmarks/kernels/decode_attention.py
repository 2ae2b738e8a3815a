"""Attention of decoding: one query for each of B sequences over S cached tokens in pages of a block pool.

    python -m benchmarks.kernels.decode_attention [--device cuda] [--dtype bf16] [--sizes BxSxHxKxD ...]

Bound by reading the keys and values once. ``paged kernel`` reads pages in place, the other variants gather them first.
``contiguous`` reads the same keys and values without pages, the limit of a kernel that reads pages in place.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.harness import Case, compiled, dimensions, main

SIZES = {"cpu": ["1x1024x14x2x64", "16x512x14x2x64"], "cuda": ["1x4096x32x8x128", "64x1024x32x8x128"]}
PAGE = 16  # tokens


def formula(q: Tensor, keys: Tensor, values: Tensor, pages: Tensor) -> Tensor:
    k, v = (gather(pool, pages) for pool in (keys, values))
    heads = []
    for head in range(q.shape[1]):
        shared = head * k.shape[2] // q.shape[1]
        weights = torch.einsum("bd,bsd->bs", q[:, head], k[:, :, shared]).div(q.shape[-1] ** 0.5).softmax(-1)
        heads.append(torch.einsum("bs,bsd->bd", weights, v[:, :, shared]))
    return torch.stack(heads, 1)


def gather(pool: Tensor, pages: Tensor) -> Tensor:
    """Pool (pages, PAGE, K, D) and page table (B, pages of a sequence) -> (B, S, K, D)."""
    return pool[pages].flatten(1, 2)


def gathered_sdpa(q: Tensor, keys: Tensor, values: Tensor, pages: Tensor) -> Tensor:
    k, v = (gather(pool, pages).transpose(1, 2) for pool in (keys, values))
    return scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def grouped_matmul(q: Tensor, keys: Tensor, values: Tensor, pages: Tensor) -> Tensor:
    """The heads of a group as the rows of one product, so that keys and values are not repeated."""
    k, v = (gather(pool, pages).transpose(1, 2) for pool in (keys, values))
    grouped = q.unflatten(1, (k.shape[1], -1))
    weights = (grouped @ k.mT).float().div(q.shape[-1] ** 0.5).softmax(-1).to(v.dtype)
    return (weights @ v).flatten(1, 2)


def paged(q: Tensor, keys: Tensor, values: Tensor, pages: Tensor) -> Tensor:
    """What the engine runs on a GPU. It also writes the last token's key and value, here those that are there."""
    from bumblebee.nn.paged_attention import paged_decode_attention

    k, v = (pool[pages[:, -1], -1] for pool in (keys, values))
    rows, lengths = (torch.arange(len(q), device=q.device), torch.full((len(q),), pages.shape[1] * PAGE, device=q.device))
    return paged_decode_attention(q, k, v, keys, values, pages, rows, lengths)


def cases(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Case]:
    rows, length, heads, kv_heads, width = dimensions(size, "BxSxHxKxD")
    if length % PAGE:
        raise SystemExit(f"--sizes: S must be a multiple of {PAGE}, got {length}")
    count = rows * length // PAGE
    keys, values = (torch.randn(count, PAGE, kv_heads, width, device=device, dtype=dtype) for _ in range(2))
    q = torch.randn(rows, heads, width, device=device, dtype=dtype)
    pages = torch.randperm(count, device=device).view(rows, -1)
    variants, missing = compiled(grouped_matmul, device)
    if device.type == "cuda":
        variants["paged kernel"] = paged
    else:
        missing["paged kernel"] = "needs a GPU"
    variants = {"gather + sdpa": gathered_sdpa, "gather + grouped matmul": grouped_matmul, **variants}
    yield Case(size, (q, keys, values, pages), formula, variants, missing, bytes=2 * keys.nbytes)
    k, v = (gather(pool, pages).transpose(1, 2).contiguous() for pool in (keys, values))

    def contiguous(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    exact = formula(q.double(), keys.double(), values.double(), pages)
    yield Case(f"{size} contiguous", (q, k, v), lambda *_: exact, {"sdpa": contiguous}, bytes=2 * keys.nbytes)


if __name__ == "__main__":
    sys.exit(main("decode_attention (sequences x cached tokens x heads x key-value heads x width)", cases, SIZES))
