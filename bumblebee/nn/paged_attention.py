"""Decode attention over a paged KV cache as a Triton kernel: reads keys and values where they are, and writes the new ones.

One new token of each of B sequences attends to its sequence, itself included: ``softmax(q k / sqrt(D)) v``. Its key and value
are stored in its sequence's block (PagedAttention, arXiv 2309.06180) by the program that reads that position, from the
arguments and not from memory, so no other program depends on the store.

The query heads that share a key-value head are the rows of one matmul (arXiv 2305.13245). The positions of a sequence are cut
into ``splits`` parts, each of which computes a softmax of its own; a second kernel weights the parts by their sums
(Flash-Decoding, https://pytorch.org/blog/flash-decoding/; the online softmax is that of arXiv 1805.02867). The number of parts
depends on shapes only, never on lengths, so a CUDA graph may hold the kernel.

This file is imported only where the kernel is used: Triton comes with the CUDA builds of torch. Its tests interpret it on a
CPU, and compile it for GPUs. Shapes: B sequences, H query heads, K key-value heads, D head width.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_SPLITS = 64
TILE_BYTES = 2**14  # of keys that a program reads at a time


@triton.jit
def _attend(
    q, k, v, keys, values, tables, rows, lengths, out, sums,
    q_stride, k_stride, v_stride, table_stride, scale, window,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr,
    TILE: tl.constexpr, PADDED_GROUP: tl.constexpr, PADDED_D: tl.constexpr,
):  # fmt: skip
    """One part of one sequence for one key-value head: its output and the logarithm of the sum of its exponentials."""
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_kv_heads = tl.num_programs(1)
    length = tl.load(lengths + sequence).to(tl.int32)  # 0 for a padded row, which reads and writes nothing
    table = tables + tl.load(rows + sequence) * table_stride
    first = tl.maximum(length - window, 0)
    part = tl.cdiv(tl.cdiv(length - first, SPLITS), TILE) * TILE
    begin = first + split * part
    end = tl.minimum(begin + part, length)

    group, width, places = tl.arange(0, PADDED_GROUP), tl.arange(0, PADDED_D), tl.arange(0, TILE)
    in_width = width < D
    in_query = (group < GROUP)[:, None] & in_width[None, :]
    heads = head * GROUP + group
    query = tl.load(q + sequence * q_stride + heads[:, None] * D + width[None, :], mask=in_query, other=0.0)
    new_key = tl.load(k + sequence * k_stride + head * D + width, mask=in_width, other=0.0)
    new_value = tl.load(v + sequence * v_stride + head * D + width, mask=in_width, other=0.0)

    maximum = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    weighted = tl.zeros([PADDED_GROUP, PADDED_D], tl.float32)
    for start in range(begin, end, TILE):
        position = start + places
        visible = position < end
        block = tl.load(table + position // BLOCK_SIZE, mask=visible, other=0).to(tl.int64)
        slot = ((block * BLOCK_SIZE + position % BLOCK_SIZE) * num_kv_heads + head) * D
        is_new = (position == length - 1)[:, None]
        stored = visible[:, None] & in_width[None, :] & (position < length - 1)[:, None]
        key = tl.load(keys + slot[:, None] + width[None, :], mask=stored, other=0.0)
        key = tl.where(is_new, new_key[None, :], key)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        rescale = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum[:, None])
        value = tl.load(values + slot[:, None] + width[None, :], mask=stored, other=0.0)
        value = tl.where(is_new, new_value[None, :], value)
        weighted = weighted * rescale[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        total = total * rescale + tl.sum(weights, 1)
        maximum = new_maximum

    if (begin < end) & (end == length):
        last = length - 1
        block = tl.load(table + last // BLOCK_SIZE).to(tl.int64)
        slot = ((block * BLOCK_SIZE + last % BLOCK_SIZE) * num_kv_heads + head) * D
        tl.store(keys + slot + width, new_key, mask=in_width)
        tl.store(values + slot + width, new_value, mask=in_width)

    is_empty = total == 0.0
    result = weighted / tl.where(is_empty, 1.0, total)[:, None]
    at = (sequence * num_kv_heads * GROUP + heads) * SPLITS + split
    tl.store(out + at[:, None] * D + width[None, :], result.to(out.dtype.element_ty), mask=in_query)
    if SPLITS > 1:
        log_sum = tl.where(is_empty, float("-inf"), maximum + tl.log(tl.where(is_empty, 1.0, total)))
        tl.store(sums + at, log_sum, mask=group < GROUP)


@triton.jit
def _combine(parts, sums, out, D: tl.constexpr, SPLITS: tl.constexpr, PADDED_D: tl.constexpr):
    """The output of one query head from those of its parts."""
    head = tl.program_id(0)
    split, width = tl.arange(0, SPLITS), tl.arange(0, PADDED_D)
    log_sum = tl.load(sums + head * SPLITS + split)
    maximum = tl.max(log_sum, 0)
    weights = tl.exp(log_sum - tl.where(maximum == float("-inf"), 0.0, maximum))
    part = tl.load(
        parts + (head * SPLITS + split)[:, None] * D + width[None, :], mask=(width < D)[None, :], other=0.0
    )  # fmt: skip
    total = tl.sum(weights, 0)
    result = tl.sum(weights[:, None] * part, 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + head * D + width, result.to(out.dtype.element_ty), mask=width < D)


def paged_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    rows: Tensor,
    lengths: Tensor,
    window: int | None = None,
    splits: int | None = None,
) -> Tensor:
    """Store the keys and values of B decode tokens, and attend over their sequences.

    Args:
        q: (B, H, D).
        k: (B, K, D) of the new tokens, in the dtype of q; stored.
        v: (B, K, D).
        keys: (blocks, block_size, K, D), contiguous, in the dtype of q.
        values: like ``keys``.
        tables: (rows, width) int64, the blocks of each sequence in its row.
        rows: (B,) int64, the row of each sequence.
        lengths: (B,) int64, positions of each sequence, the new token included; 0 for a padded row, which reads and writes no
            block and returns zeros.
        window: positions that a token attends to, its own included; None for all.
        splits: parts of each sequence, a power of two; None to fill the GPU.

    Returns:
        (B, H, D).
    """
    count, heads, width = q.shape
    _, block_size, kv_heads, _ = keys.shape
    q, k, v = (x if x[0].is_contiguous() else x.contiguous() for x in (q, k, v))
    splits = splits or _splits(count * kv_heads, q.device)
    out = torch.empty(count, heads, width, dtype=q.dtype, device=q.device)
    parts = out if splits == 1 else torch.empty(count, heads, splits, width, dtype=torch.float32, device=q.device)
    sums = torch.empty(count, heads, splits, dtype=torch.float32, device=q.device)
    padded = max(triton.next_power_of_2(width), 16)
    group = heads // kv_heads
    _attend[count, kv_heads, splits](
        q, k, v, keys, values, tables, rows, lengths, parts, sums,
        q.stride(0), k.stride(0), v.stride(0), tables.stride(0), width**-0.5, window or 2**31 - 1,
        GROUP=group, D=width, BLOCK_SIZE=block_size, SPLITS=splits,
        TILE=min(max(TILE_BYTES // (padded * q.element_size()), 16), 128),
        PADDED_GROUP=max(triton.next_power_of_2(group), 16), PADDED_D=padded,
    )  # fmt: skip
    if splits > 1:
        _combine[(count * heads,)](parts, sums, out, D=width, SPLITS=splits, PADDED_D=padded)
    return out


def _splits(programs: int, device: torch.device) -> int:
    """Parts with which the programs are about twice as many as the GPU's processors."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(triton.next_power_of_2(triton.cdiv(2 * processors, programs)), MAX_SPLITS)
