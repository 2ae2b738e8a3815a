"""The paged decode kernel, interpreted on the CPU, equals the formula for any block tables, lengths, groups and windows."""

from __future__ import annotations

import pytest
import torch
from helpers.interpreted_triton import interpreted
from torch import Tensor

BLOCKS, WIDTH = 24, 6
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def kernel():
    with interpreted("bumblebee.nn.paged_attention") as module:
        yield module


def formula(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One sequence: ``q`` (H, D) over k and v (S, K, D), in fp64."""
    if window is not None:
        k, v = k[-window:], v[-window:]
    k, v = (x.double().repeat_interleave(len(q) // k.shape[1], 1) for x in (k, v))
    weights = (torch.einsum("hd,shd->hs", q.double(), k) / q.shape[1] ** 0.5).softmax(-1)
    return torch.einsum("hs,shd->hd", weights, v)


# heads, key-value heads, width, block size, window, splits, dtype
CASES = [
    (4, 2, 8, 4, None, 1, torch.float32),
    (4, 2, 8, 4, None, 4, torch.float32),
    (14, 2, 64, 16, None, 2, torch.bfloat16),
    pytest.param(3, 3, 80, 16, 20, 2, torch.float32, marks=pytest.mark.slow),
    pytest.param(6, 1, 32, 1, 3, 1, torch.float16, marks=pytest.mark.slow),
    pytest.param(8, 4, 16, 16, 1, 4, torch.bfloat16, marks=pytest.mark.slow),
    pytest.param(32, 1, 128, 16, 1000, 4, torch.float32, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("dtype", "width", "splits"), [("bf16", 128, 64), ("fp32", 256, 1)])
def test_kernel_compiles_for_an_h100_without_one(dtype, width, splits, tmp_path, monkeypatch):
    """Before the interpreted kernel is imported, in this order."""
    pytest.importorskip("triton")
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bumblebee.nn.paged_attention import _attend, _combine

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = dict.fromkeys(("q", "k", "v", "keys", "values"), f"*{dtype}") | {"scale": "fp32", "sums": "*fp32"}
    pointers |= dict.fromkeys(("tables", "rows", "lengths"), "*i64") | {"out": "*fp32", "parts": "*fp32"}
    values = {"GROUP": 7, "D": width, "BLOCK_SIZE": 16, "SPLITS": splits, "TILE": 16, "PADDED_GROUP": 16, "PADDED_D": width}
    for kernel in (_attend, _combine):
        constants = {name: value for name, value in values.items() if name in kernel.arg_names}
        kinds = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
        compiled = compile(ASTSource(kernel, kinds, constexprs=constants), target=GPUTarget("cuda", 90, 32))
        assert compiled.metadata.shared <= 99 * 1024 and compiled.asm["cubin"]  # what every GPU since the RTX 30 series has


@pytest.mark.parametrize(("heads", "kv_heads", "width", "size", "window", "splits", "dtype"), CASES)
def test_kernel_equals_the_formula_and_stores_keys_and_values(kernel, heads, kv_heads, width, size, window, splits, dtype):
    """What was never written is NaN; padded rows return zeros; only the new slots change."""
    generator = torch.Generator().manual_seed(heads + width)
    lengths = torch.tensor([1, 0, size, size + 1, WIDTH * size, 0, 3 * size - 1])
    count, rows = len(lengths), torch.randperm(len(lengths) + 2, generator=generator)[: len(lengths)]
    tables = torch.zeros(count + 2, WIDTH, dtype=torch.int64)
    blocks = iter(torch.randperm(BLOCKS, generator=generator).tolist())
    keys, values = (torch.full((BLOCKS, size, kv_heads, width), float("nan"), dtype=dtype) for _ in range(2))
    q = torch.randn(count, heads, width, generator=generator).to(dtype)
    both = torch.randn(count, 2 * kv_heads, width, generator=generator).to(dtype)
    k, v = both.split(kv_heads, dim=1)  # views, as a fused projection returns them
    expected, slots = [], []
    for index, length in enumerate(lengths.tolist()):
        own = torch.tensor([next(blocks) for _ in range(-(-length // size))], dtype=torch.int64)
        tables[rows[index], : len(own)] = own
        position = torch.arange(max(length - 1, 0))
        before = own[position // size] if length > 1 else own[:0], position % size
        for cache in (keys, values):
            cache[before] = torch.randn(len(position), kv_heads, width, generator=generator).to(dtype)
        if length:
            sequence = [torch.cat([cache[before], new[index][None]]) for cache, new in ((keys, k), (values, v))]
            expected.append(formula(q[index], *sequence, window))
            slots.append((int(own[(length - 1) // size]), (length - 1) % size, index))
        else:
            expected.append(torch.zeros(heads, width))
    stored = [cache.clone() for cache in (keys, values)]
    for block, place, index in slots:
        stored[0][block, place], stored[1][block, place] = k[index], v[index]
    out = kernel.paged_decode_attention(q, k, v, keys, values, tables, rows, lengths, window, splits)
    torch.testing.assert_close(out.double(), torch.stack(expected).double(), rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close([keys, values], stored, rtol=0, atol=0, equal_nan=True)
