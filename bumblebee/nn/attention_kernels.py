"""Attention kernels: one signature, several implementations, and the mask that they share.

    kernel(q, k, v, mask, window, dropout) -> out        q: (B, T, H, D)   k, v: (B, S, K, D)   out: (B, T, H, D)

H query heads share K key-value heads in groups of H / K. With a sliding window W (arXiv 2004.05150), a query attends to the
last W positions, its own included; None is full attention. ``dropout`` is the dropout probability of attention weights.

- ``naive`` writes the formula out; the other kernels are tested against it.
- ``sdpa`` is torch's ``scaled_dot_product_attention``.
- ``flash`` is the flash-attn package, which never materializes a (T, S) mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention


class AttentionMask:
    """Which keys each query attends to: causal, and within one document in packed rows. Built once per forward pass.

    Args:
        documents: (B, T) document number of each position in packed rows; None if each row is one document.
    """

    def __init__(self, documents: Tensor | None = None) -> None:
        self.documents = documents
        self._copies: dict[torch.device, AttentionMask] = {}  # by device
        self._dense: dict[tuple[int, int, int | None], Tensor] = {}

    @classmethod
    def packed(cls, position_ids: Tensor) -> AttentionMask:
        """Mask of packed rows: a document begins wherever ``position_ids`` (B, T) is 0."""
        return cls(documents=(position_ids == 0).cumsum(dim=1))

    def to(self, device: torch.device) -> AttentionMask:
        """Return the mask for layers on another device."""
        if device not in self._copies:
            self._copies[device] = AttentionMask(None if self.documents is None else self.documents.to(device))
        return self._copies[device]

    @property
    def is_causal(self) -> bool:
        """Whether each row is one document, so that a kernel's causal mode suffices."""
        return self.documents is None

    def dense(self, queries: int, keys: int, device: torch.device, window: int | None = None) -> Tensor:
        """(B or 1, 1, T, S) bool, True where the query attends to the key."""
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
    def cu_seqlens(self) -> tuple[Tensor, int]:
        """Document boundaries in the flattened batch, (documents + 1,) int32, and the longest document in tokens."""
        assert self.documents is not None
        rows = torch.arange(len(self.documents), device=self.documents.device)[:, None]
        lengths = torch.unique_consecutive(rows * 2**32 + self.documents, return_counts=True)[1]  # synchronizes with the GPU
        return pad(lengths.cumsum(0), (1, 0)).to(torch.int32), int(lengths.max())


class Kernel(Protocol):
    """Signature of an attention kernel; see the module docstring."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, window: int | None = None, dropout: float = 0.0
    ) -> Tensor: ...


def naive(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, window: int | None = None, dropout: float = 0.0) -> Tensor:
    """``softmax(q k / sqrt(D)) v`` with all scores materialized and the softmax in fp32 (arXiv 1706.03762)."""
    k, v = (repeat(x, "b s k d -> b s (k g) d", g=q.shape[2] // k.shape[2]) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k).float() * q.shape[-1] ** -0.5
    visible = mask.dense(q.shape[1], k.shape[1], q.device, window)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1).to(v.dtype)
    return torch.einsum("bhts,bshd->bthd", torch.dropout(weights, dropout, train=True), v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, window: int | None = None, dropout: float = 0.0) -> Tensor:
    """torch's ``scaled_dot_product_attention``, which selects a fused kernel by itself."""
    window = None if window is not None and window >= k.shape[1] else window
    visible = None if mask.is_causal and window is None else mask.dense(q.shape[1], k.shape[1], q.device, window)
    grouped = q.shape[2] != k.shape[2]
    if grouped and q.device.type != "cpu" and visible is not None:
        # No fused GPU kernel supports both a mask and GQA: torch would fall back to the slow math kernel.
        k, v = (repeat(x, "b s k d -> b s (k g) d", g=q.shape[2] // k.shape[2]) for x in (k, v))
        grouped = False
    q, k, v = (rearrange(x, "b t h d -> b h t d") for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, visible, dropout, is_causal=visible is None, enable_gqa=grouped)
    return rearrange(out, "b h t d -> b t h d")


def flash(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, window: int | None = None, dropout: float = 0.0) -> Tensor:
    """flash-attn (arXiv 2307.08691): bf16 or fp16 on a GPU."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    sides = (-1, -1) if window is None else (window - 1, 0)  # positions attended to the left and right; -1 for all
    deterministic = torch.are_deterministic_algorithms_enabled()  # else the backward pass adds in any order
    if mask.documents is None:
        return flash_attn_func(
            q, k, v, causal=True, window_size=sides, dropout_p=dropout, deterministic=deterministic
        )  # fmt: skip
    ends, longest = mask.cu_seqlens
    flat = (rearrange(x, "b t h d -> (b t) h d") for x in (q, k, v))
    out = flash_attn_varlen_func(
        *flat, ends, ends, longest, longest,
        causal=True, window_size=sides, dropout_p=dropout, deterministic=deterministic,
    )  # fmt: skip
    return rearrange(out, "(b t) h d -> b t h d", b=q.shape[0])


KERNELS: dict[str, Kernel] = {"naive": naive, "sdpa": sdpa, "flash": flash}


def flash_problems(dtype: torch.dtype | None) -> Iterator[str]:
    """Yield the reasons why flash-attn cannot run here; none if it can. None is a dtype that is not known yet."""
    yield from flash_machine_problems()
    if dtype not in (None, torch.bfloat16, torch.float16):
        yield f"it computes in bf16 or fp16, not in {str(dtype).removeprefix('torch.')}"


_machine_problems: list[str] | None = None  # of flash-attn. Not functools.cache: torch.compile calls what it wraps


def flash_machine_problems() -> list[str]:
    """Return why flash-attn cannot run on this machine, in any dtype. Computed once, since every attention call reads it."""
    global _machine_problems
    if _machine_problems is None:
        _machine_problems = _find_machine_problems()
    return _machine_problems


def _find_machine_problems() -> list[str]:
    problems = [] if (problem := _flash_import_problem()) is None else [problem]
    if not torch.cuda.is_available():
        problems.append("no GPU is visible")
    elif torch.cuda.get_device_capability() < (8, 0):
        problems.append("it needs a GPU of compute capability 8.0 (A100) or above")
    return problems


def _flash_import_problem() -> str | None:
    """Import flash-attn: it may be found and yet fail, as when it was built for another torch, or is only flash-attn-4."""
    try:
        from flash_attn import flash_attn_func, flash_attn_varlen_func  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == "flash_attn":
            return "the flash-attn package is not installed (pip install flash-attn --no-build-isolation)"
        return f"the flash-attn package cannot be imported: {error}"
    except (ImportError, OSError) as error:  # undefined symbols, or a missing library
        return f"the flash-attn package cannot be imported: {str(error).splitlines()[0]}"
    return None


def select_kernel(name: str, dtype: torch.dtype | None) -> str:
    """Resolve a kernel name: ``auto`` is flash-attn if it can run, else torch's SDPA.

    Args:
        name: auto, or a key of KERNELS.
        dtype: of queries, keys and values; None if it is not known yet.

    Raises:
        ValueError: ``name`` is unknown, or is flash where flash-attn cannot run.
    """
    if name == "auto":
        return "flash" if next(flash_problems(dtype), None) is None else "sdpa"
    if name not in KERNELS:
        raise ValueError(f"unknown attention {name!r}; available: auto, {', '.join(KERNELS)}")
    if name == "flash" and (problems := list(flash_problems(dtype))):
        raise ValueError(f"attention 'flash' cannot run: {'; '.join(problems)}")
    return name


def kernel_of(model: nn.Module, dtype: torch.dtype) -> str | None:
    """The kernel that a model uses for queries of a dtype; None for a model that does not choose one of ours."""
    attention = getattr(model, "attention", None)
    return select_kernel(attention, dtype) if isinstance(attention, str) else None
