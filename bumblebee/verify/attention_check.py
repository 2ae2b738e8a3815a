"""The attention kernel that the model would use, against the formula written out once more in fp64, its masks included; and the
generator's attention over its paged cache.

Four measures: the worst output vector, the scale of all outputs, the gradients, and the worst output vector over the cache.
Bounds: see ``rounding``.
Shapes: B rows, T queries, S keys, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bumblebee.inference.attention_metadata import AttentionMetadata
from bumblebee.inference.kv_cache import PagedLayerCache
from bumblebee.nn.attention_kernels import KERNELS, AttentionMask
from bumblebee.verify.check_result import Measure
from bumblebee.verify.tolerances import COMMON, WHOLE, WORST, distance, scale_error, unit

B, S, H, K = 2, 201, 8, 2  # a length that no tile of a kernel divides
WIDTHS = (64, 128)
WINDOW = 50
BLOCK_SIZE = 16  # positions per block of the KV cache
BLOCKS = -(-S // BLOCK_SIZE)
DOCUMENTS = ((70, 1, 130), (201,))  # lengths, in each row of packed windows


def measures(kernel: str, dtype: torch.dtype, device: torch.device) -> list[Measure]:
    """The worst over plain causal rows, packed documents, and both with a sliding window; and over a cache."""
    found = [_one(kernel, dtype, width, mask, window, seen) for width in WIDTHS for mask, window, seen in _layouts(device)]
    cached = [_cached(dtype, width, padding, device) for width in WIDTHS for padding in (0.0, float("inf"))]
    bounds = {"worst vector": WORST, "scale": COMMON, "gradients": WHOLE, "cached": WORST}
    columns = [*zip(*found, strict=True), cached]
    return [Measure(name, max(column), bounds[name] * unit(dtype)) for name, column in zip(bounds, columns, strict=True)]


def formula(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """softmax(q k / sqrt(D)) v over the keys that are seen (arXiv 1706.03762).

    Args:
        q: (B, T, H, D).
        k: (B, S, K, D); each of its heads serves H / K query heads.
        v: (B, S, K, D).
        seen: (B, T, S) booleans.
    """
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def _layouts(device: torch.device) -> list[tuple[AttentionMask, int | None, Tensor]]:
    """Masks and windows as the model makes them, with the (B, T, S) booleans that they must mean."""
    keys = torch.arange(S, device=device)
    earlier = (keys <= keys[:, None]).expand(B, S, S)
    numbers, within = (
        torch.tensor([[pair[part] for pair in _places(row)] for row in DOCUMENTS], device=device) for part in (0, 1)
    )
    documents, near = earlier & (numbers[:, :, None] == numbers[:, None, :]), keys > keys[:, None] - WINDOW
    return [
        (AttentionMask(), None, earlier),
        (AttentionMask.packed(within), None, documents),
        (AttentionMask(), WINDOW, earlier & near),
        (AttentionMask.packed(within), WINDOW, documents & near),
    ]


def _places(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """For each token of a row (number of its document, place in it)."""
    return [(number, place) for number, length in enumerate(lengths) for place in range(length)]


def _one(
    kernel: str, dtype: torch.dtype, width: int, mask: AttentionMask, window: int | None, seen: Tensor
) -> tuple[float, float, float]:
    generator = torch.Generator().manual_seed(width)
    shapes = [(B, seen.shape[1], H, width), (B, S, K, width), (B, S, K, width), (B, seen.shape[1], H, width)]
    *inputs, slope = (torch.randn(shape, generator=generator).to(seen.device, dtype) for shape in shapes)
    q, k, v = leaves = [x.requires_grad_() for x in inputs]
    out = KERNELS[kernel](q, k, v, mask, window)
    q, k, v = exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = formula(q, k, v, seen)
    gradients = zip(torch.autograd.grad(out, leaves, slope), torch.autograd.grad(wanted, exact, slope.double()), strict=True)
    off = ((out.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()
    return off, scale_error(out, wanted), max(distance(*pair) for pair in gradients)


def _cached(dtype: torch.dtype, width: int, padding: float, device: torch.device) -> float:
    """The worst vector of two sequences that grow in a cache: most of each at once, then token by token.

    Args:
        dtype: of queries, keys and values.
        width: D.
        padding: whether single tokens share a call: see ``AttentionMetadata.build``.
        device: of the cache.
    """
    generator = torch.Generator().manual_seed(width)
    q, k, v = (torch.randn((B, S, heads, width), generator=generator).to(device, dtype) for heads in (H, K, K))
    cache = PagedLayerCache((B * BLOCKS, BLOCK_SIZE, K, width), dtype, device)
    block_tables = [list(range(row * BLOCKS, (row + 1) * BLOCKS))[::-1] for row in range(B)]  # in no order that means anything
    found = []
    for begin, end in [(0, S - 3), *((place, place + 1) for place in range(S - 3, S))]:
        cache.metadata = AttentionMetadata.build(block_tables, [end] * B, [end - begin] * B, BLOCK_SIZE, device, padding)
        queries, keys, values = (x[:, begin:end].flatten(0, 1)[None] for x in (q, k, v))
        found.append(cache.attend(queries, keys, values)[0].unflatten(0, (B, -1)))
    places = torch.arange(S, device=device)
    wanted = formula(q.double(), k.double(), v.double(), (places <= places[:, None]).expand(B, S, S))
    return ((torch.cat(found, dim=1).double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()
