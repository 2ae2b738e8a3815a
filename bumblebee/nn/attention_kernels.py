"""Attention kernels: one signature, several ways to compute it, and the mask they share.

    kernel(q, k, v, mask, window, dropout) -> out        q: (B, T, H, D)   k, v: (B, S, K, D)   out: (B, T, H, D)

H query heads share K key-value heads in groups of H / K. With a sliding window W (arXiv 2004.05150) a query sees the last W
positions only, its own among them; None is without. ``dropout`` is the share of attention weights that is zeroed.
``naive`` is the formula, and what the others are tested against; ``sdpa`` is torch's fused attention; ``flash`` is the
flash-attn package, which never builds a (T, S) mask.
"""

from __future__ import annotations

from functools import cached_property
from importlib.util import find_spec
from typing import Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


class AttentionMask:
    """Which key each query sees: always causal, in packed windows within a document. Built once a forward, for all layers.

    Args:
        documents: packed windows: (B, T) number of the document each position belongs to; others are not seen.
    """

    def __init__(self, documents: Tensor | None = None) -> None:
        self.documents = documents
        self._copies: dict[torch.device, AttentionMask] = {}  # for other devices
        self._dense: dict[tuple[int, int, int | None], Tensor] = {}

    @classmethod
    def packed(cls, position_ids: Tensor) -> AttentionMask:
        """``position_ids`` (B, T): a document begins wherever the position is 0."""
        return cls(documents=(position_ids == 0).cumsum(dim=1))

    def to(self, device: torch.device) -> AttentionMask:
        """The same for layers on another device."""
        if device not in self._copies:
            self._copies[device] = AttentionMask(None if self.documents is None else self.documents.to(device))
        return self._copies[device]

    @property
    def only_causal(self) -> bool:
        """One document per row: a kernel's own causal mode is enough."""
        return self.documents is None

    def dense(self, queries: int, keys: int, device: torch.device, window: int | None = None) -> Tensor:
        """(B or 1, 1, T, S) booleans, true where the query sees the key."""
        if (queries, keys, window) not in self._dense:
            self._dense[queries, keys, window] = self._build(queries, keys, device, window)
        return self._dense[queries, keys, window]

    def _build(self, queries: int, keys: int, device: torch.device, window: int | None) -> Tensor:
        causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()[None, None]
        if window is not None:
            causal = causal.triu(1 - window)
        if self.documents is None:
            return causal
        return causal & (self.documents[:, None, :, None] == self.documents[:, None, None, :])

    @cached_property
    def cumulative_lengths(self) -> tuple[Tensor, int]:
        """Where documents begin in the flattened batch, (documents + 1,) int32, and the longest document in tokens."""
        assert self.documents is not None
        rows = torch.arange(len(self.documents), device=self.documents.device)[:, None]
        lengths = torch.unique_consecutive(rows * 2**32 + self.documents, return_counts=True)[1]  # the GPU is waited for
        return pad(lengths.cumsum(0), (1, 0)).to(torch.int32), int(lengths.max())


class Kernel(Protocol):
    """See the top of the file."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, window: int | None = None, dropout: float = 0.0
    ) -> Tensor: ...


def naive(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, window: int | None = None, dropout: float = 0.0) -> Tensor:
    """softmax(q k / sqrt(D)) v with every score written out, the softmax in fp32 (arXiv 1706.03762)."""
    k, v = (repeat(x, "b s k d -> b s (k g) d", g=q.shape[2] // k.shape[2]) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k).float() * q.shape[-1] ** -0.5
    seen = mask.dense(q.shape[1], k.shape[1], q.device, window)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1).to(v.dtype)
    return torch.einsum("bhts,bshd->bthd", torch.dropout(weights, dropout, train=True), v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, window: int | None = None, dropout: float = 0.0) -> Tensor:
    """torch's scaled_dot_product_attention, which picks its own fused kernel."""
    window = None if window is not None and window >= k.shape[1] else window
    seen = None if mask.only_causal and window is None else mask.dense(q.shape[1], k.shape[1], q.device, window)
    grouped = q.shape[2] != k.shape[2]
    if grouped and q.device.type != "cpu" and seen is not None:
        # On a GPU no fused kernel takes both a mask and shared heads: without this the slow formula would be picked.
        k, v = (repeat(x, "b s k d -> b s (k g) d", g=q.shape[2] // k.shape[2]) for x in (k, v))
        grouped = False
    q, k, v = (rearrange(x, "b t h d -> b h t d") for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, seen, dropout, is_causal=seen is None, enable_gqa=grouped)
    return rearrange(out, "b h t d -> b t h d")


def flash(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, window: int | None = None, dropout: float = 0.0) -> Tensor:
    """The flash-attn package (arXiv 2307.08691): bf16 or fp16 on a GPU."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    sides = (-1, -1) if window is None else (window - 1, 0)  # how many positions are seen before and behind; -1 for all
    if mask.documents is None:
        return flash_attn_func(q, k, v, causal=True, window_size=sides, dropout_p=dropout)
    ends, longest = mask.cumulative_lengths
    flat = (rearrange(x, "b t h d -> (b t) h d") for x in (q, k, v))
    out = flash_attn_varlen_func(
        *flat, ends, ends, longest, longest, causal=True, window_size=sides, dropout_p=dropout
    )  # fmt: skip
    return rearrange(out, "(b t) h d -> b t h d", b=q.shape[0])


KERNELS: dict[str, Kernel] = {"naive": naive, "sdpa": sdpa, "flash": flash}


def flash_is_usable(dtype: torch.dtype) -> bool:
    """Whether flash-attn is installed, a GPU is there and the dtype is one it takes."""
    return find_spec("flash_attn") is not None and torch.cuda.is_available() and dtype in (torch.bfloat16, torch.float16)


def choose(name: str, dtype: torch.dtype) -> str:
    """The kernel that ``name`` stands for: ``auto`` is flash-attn where it can run, else torch's fused attention.

    Raises:
        ValueError: an unknown name, or flash asked for where it cannot run.
    """
    if name == "auto":
        return "flash" if flash_is_usable(dtype) else "sdpa"
    if name not in KERNELS:
        raise ValueError(f"unknown attention {name!r}; known are auto, {', '.join(KERNELS)}")
    if name == "flash" and not flash_is_usable(dtype):
        raise ValueError(
            f"attention 'flash' needs the flash-attn package (pip install 'bumblebee[flash-attn]'), a GPU, and bf16 or fp16;"
            f" here the dtype is {str(dtype).removeprefix('torch.')} and"
            f" {'a' if torch.cuda.is_available() else 'no'} GPU is visible"
        )
    return name
