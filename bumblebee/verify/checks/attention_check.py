"""Attention kernel check: the kernel that the model selects against the formula in fp64, with masks and gradients, and the
generator's attention over its paged KV cache.

Reports the worst output vector, the scale of all outputs, the gradients, and the worst output vector over the cache. Bounds:
see ``tolerances``.
Shapes: B rows, T queries, S keys, H query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bumblebee.inference.attention_metadata import AttentionMetadata
from bumblebee.inference.kv_cache import PagedLayerCache
from bumblebee.nn.attention_kernels import KERNELS, AttentionMask
from bumblebee.verify.check_result import CheckResult, Measurement
from bumblebee.verify.checks.tolerances import (
    COMMON,
    WHOLE,
    WORST,
    relative_error,
    rounding_unit,
    scale_error,
    worst_vector_error,
)
from bumblebee.verify.context import Context

# S is not a multiple of any kernel's tile size, and longer than two blocks of keys: flash kernels add the gradients of several.
B, S, H, K = 2, 329, 8, 2
HEAD_DIMS = (64, 128)
WINDOW = 50
BLOCK_SIZE = 16  # positions in a block of the cache
NUM_BLOCKS = -(-S // BLOCK_SIZE)  # of a sequence
DOCUMENT_LENGTHS = ((58, 1, 270), (329,))  # in each packed row


def run(context: Context) -> CheckResult:
    """The worst case over causal rows, packed documents, both with a sliding window, and the cache."""
    dtype, device = context.dtype, context.device
    cases = [(head_dim, *case) for head_dim in HEAD_DIMS for case in _mask_cases(device)]
    errors = [_kernel_errors(context.kernel, dtype, *case) for case in cases]
    cached = [_cache_error(dtype, head_dim, padding, device) for head_dim in HEAD_DIMS for padding in (0.0, float("inf"))]
    bounds = {"worst vector": WORST, "scale": COMMON, "gradients": WHOLE, "cached": WORST}
    columns = [*zip(*errors, strict=True), cached]
    return CheckResult(
        tuple(
            Measurement(name, max(column), bounds[name] * rounding_unit(dtype))
            for name, column in zip(bounds, columns, strict=True)
        )
    )


def attention_formula(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """softmax(q k / sqrt(D)) v over the visible keys (arXiv 1706.03762).

    Args:
        q: (B, T, H, D).
        k: (B, S, K, D); each head serves H / K query heads.
        v: (B, S, K, D).
        visible: (B, T, S) booleans.
    """
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def _mask_cases(device: torch.device) -> list[tuple[AttentionMask, int | None, Tensor]]:
    """Masks and windows as the model builds them, each with the (B, T, S) booleans that it stands for."""
    keys = torch.arange(S, device=device)
    causal = (keys <= keys[:, None]).expand(B, S, S)
    documents, positions = (torch.tensor(rows, device=device) for rows in _packed_rows())
    same_document = causal & (documents[:, :, None] == documents[:, None, :])
    in_window = keys > keys[:, None] - WINDOW
    return [
        (AttentionMask(), None, causal),
        (AttentionMask.packed(positions), None, same_document),
        (AttentionMask(), WINDOW, causal & in_window),
        (AttentionMask.packed(positions), WINDOW, same_document & in_window),
    ]


def _packed_rows() -> tuple[list[list[int]], list[list[int]]]:
    """For each token of each row, the index of its document and its position in the document."""
    documents = [[i for i, length in enumerate(row) for _ in range(length)] for row in DOCUMENT_LENGTHS]
    positions = [[i for length in row for i in range(length)] for row in DOCUMENT_LENGTHS]
    return documents, positions


def _kernel_errors(
    kernel: str, dtype: torch.dtype, head_dim: int, mask: AttentionMask, window: int | None, visible: Tensor
) -> tuple[float, float, float]:
    """Errors of the worst output vector, of the scale, and of the worst gradient."""
    generator = torch.Generator().manual_seed(head_dim)
    shapes = [(B, S, heads, head_dim) for heads in (H, K, K, H)]
    *inputs, grad_output = (torch.randn(shape, generator=generator).to(visible.device, dtype) for shape in shapes)
    q, k, v = leaves = [x.requires_grad_() for x in inputs]
    output = KERNELS[kernel](q, k, v, mask, window)
    q, k, v = exact_leaves = [x.detach().double().requires_grad_() for x in inputs]
    expected = attention_formula(q, k, v, visible)
    gradients = zip(
        torch.autograd.grad(output, leaves, grad_output),
        torch.autograd.grad(expected, exact_leaves, grad_output.double()),
        strict=True,
    )
    return worst_vector_error(output, expected), scale_error(output, expected), max(relative_error(*pair) for pair in gradients)


def _cache_error(dtype: torch.dtype, head_dim: int, padding: float, device: torch.device) -> float:
    """Error of the worst output vector of two sequences in a paged cache: a long prefill, then single tokens.

    Args:
        dtype: of queries, keys and values.
        head_dim: D.
        padding: whether decoding sequences share a call, see ``AttentionMetadata.build``.
        device: of the cache.
    """
    generator = torch.Generator().manual_seed(head_dim)
    q, k, v = (torch.randn((B, S, heads, head_dim), generator=generator).to(device, dtype) for heads in (H, K, K))
    cache = PagedLayerCache((B * NUM_BLOCKS, BLOCK_SIZE, K, head_dim), dtype, device)
    tables = [list(range(row * NUM_BLOCKS, (row + 1) * NUM_BLOCKS))[::-1] for row in range(B)]  # out of order on purpose
    outputs = []
    for begin, end in [(0, S - 3), *((position, position + 1) for position in range(S - 3, S))]:
        cache.metadata = AttentionMetadata.build(tables, [end] * B, [end - begin] * B, BLOCK_SIZE, device, padding)
        queries, keys, values = (x[:, begin:end].flatten(0, 1)[None] for x in (q, k, v))
        outputs.append(cache.attend(queries, keys, values)[0].unflatten(0, (B, -1)))
    positions = torch.arange(S, device=device)
    expected = attention_formula(q.double(), k.double(), v.double(), (positions <= positions[:, None]).expand(B, S, S))
    return worst_vector_error(torch.cat(outputs, dim=1), expected)
