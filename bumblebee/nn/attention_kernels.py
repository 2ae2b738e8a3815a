"""Attention kernels: one signature, several implementations, and the mask that they share.

    kernel(q, k, v, mask, window, dropout) -> out        q: (B, T, H, D)   k, v: (B, S, K, D)   out: (B, T, H, D)

H query heads share K key-value heads in groups of H / K. With a sliding window W (arXiv 2004.05150), a query attends to the
last W positions, its own included; None is full attention. ``dropout`` is the dropout probability of attention weights.

- ``naive`` writes the formula out; the other kernels are tested against it.
- ``sdpa`` is torch's ``scaled_dot_product_attention``. Short documents of long packed rows are its rows, without a mask.
- ``varlen`` is torch's own ``varlen_attn``, the flash-attn algorithm for packed rows, which never materializes a (T, S) mask.
- ``flash`` is the flash-attn package (FlashAttention-2), which does not either.
- ``flash3`` is FlashAttention-3 (arXiv 2407.08608), for GPUs of compute capability 9.0 (H100, H200).
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Protocol, cast

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from bumblebee.nn.documents import Documents, documents_of
from bumblebee.nn.targets import scatter_rows, select_rows

MOST_PADDING = 4  # times the tokens of packed rows that their documents may take as padded rows


class AttentionMask:
    """Which keys each query attends to: causal, and within one document in packed rows. Built once per forward pass.

    Args:
        documents: (B, T) document number of each position in packed rows; None if each row is one document.
        boundaries: of these documents; None if they are not known yet.
    """

    def __init__(self, documents: Tensor | None = None, boundaries: Documents | None = None) -> None:
        self.documents, self.boundaries = documents, boundaries
        self._copies: dict[torch.device, AttentionMask] = {}  # by device
        self._dense: dict[int | None, Tensor] = {}  # by window
        self._padded: tuple[AttentionMask, Tensor, tuple[int, int]] | None = None

    @classmethod
    def packed(cls, position_ids: Tensor) -> AttentionMask:
        """Mask of rows that may be packed: a document begins wherever ``position_ids`` (B, T) is 0."""
        boundaries = documents_of(position_ids)
        if boundaries is not None and boundaries.one_per_row:
            return cls()
        return cls((position_ids == 0).cumsum(dim=1), boundaries)

    def to(self, device: torch.device) -> AttentionMask:
        """Return the mask for layers on another device."""
        if device not in self._copies:
            documents = None if self.documents is None else self.documents.to(device)
            self._copies[device] = AttentionMask(documents, None if self.boundaries is None else self.boundaries.to(device))
        return self._copies[device]

    @property
    def is_causal(self) -> bool:
        """Whether each row is one document, so that a kernel's causal mode suffices."""
        return self.documents is None

    def dense(self, queries: int, keys: int, device: torch.device, window: int | None = None) -> Tensor:
        """(B or 1, 1, T, S) bool, True where the query attends to the key."""
        window = effective_window(window, keys)
        visible = self._dense.get(window)
        if visible is None or visible.shape[-2:] != (queries, keys):
            visible = self._dense[window] = self._build(queries, keys, device, window)
        return visible

    def prepare(self, kernel: str, length: int, device: torch.device, windows: Iterable[int | None]) -> None:
        """Build what a kernel reads from the mask of rows of ``length`` tokens, for compiled layers, which else build it."""
        for window in {effective_window(window, length) for window in windows}:
            if kernel == "naive" or kernel == "sdpa" and not (self.is_causal and window is None):
                self.dense(length, length, device, window)
        if kernel not in ("naive", "sdpa") and not self.is_causal:
            self.found_boundaries()

    @property
    def has_padded_form(self) -> bool:
        """Whether documents as padded rows have at most half as many scores as packed rows, without much padding.

        Not while compiling, where the shapes of padded rows would be constants of the graph.
        """
        if torch.compiler.is_compiling() or self.documents is None or self.boundaries is None:
            return False
        documents = self.boundaries
        rows, length = self.documents.shape
        padded = len(documents) * documents.longest
        return 2 * padded * documents.longest <= rows * length**2 and padded <= MOST_PADDING * rows * length

    def padded_form(self) -> tuple[AttentionMask, Tensor, tuple[int, int]]:
        """The mask of documents as padded rows, where the positions of packed rows lie in these, and their shape."""
        if self._padded is None:
            documents = self.found_boundaries()
            assert self.documents is not None
            places = documents.padded_places(self.documents.numel())
            self._padded = AttentionMask(), places, (len(documents), documents.longest)
        return self._padded

    def _build(self, queries: int, keys: int, device: torch.device, window: int | None) -> Tensor:
        causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()[None, None]
        if window is not None:
            causal = causal.triu(1 - window)
        if self.documents is None:
            return causal
        return causal & (self.documents[:, None, :, None] == self.documents[:, None, None, :])

    def found_boundaries(self) -> Documents:
        """Boundaries of the documents; synchronizes with the GPU unless they are known."""
        assert self.documents is not None
        if self.boundaries is None:
            self.boundaries = Documents.of_starts(self.documents.diff(dim=1, prepend=self.documents[:, :1]) != 0)
        return self.boundaries


def effective_window(window: int | None, keys: int) -> int | None:
    """The sliding window, or None if it covers all keys anyway."""
    return None if window is not None and window >= keys else window


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
    if mask.has_padded_form:
        return _sdpa_of_documents(q, k, v, mask, window, dropout)
    window = effective_window(window, k.shape[1])
    visible = None if mask.is_causal and window is None else mask.dense(q.shape[1], k.shape[1], q.device, window)
    grouped = q.shape[2] != k.shape[2]
    if grouped and q.device.type != "cpu" and visible is not None:
        # No fused GPU kernel supports both a mask and GQA: torch would fall back to the slow math kernel.
        k, v = (repeat(x, "b s k d -> b s (k g) d", g=q.shape[2] // k.shape[2]) for x in (k, v))
        grouped = False
    q, k, v = (rearrange(x, "b t h d -> b h t d") for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, visible, dropout, is_causal=visible is None, enable_gqa=grouped)
    return rearrange(out, "b h t d -> b t h d")


def _sdpa_of_documents(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, window: int | None, dropout: float) -> Tensor:
    """``sdpa`` of packed rows whose documents become padded rows: causal attention never sees padding on the right."""
    of_padded, places, shape = mask.padded_form()
    q_, k_, v_ = (
        scatter_rows(x.flatten(2).flatten(0, 1), places, shape[0] * shape[1]).view(*shape, *x.shape[2:]) for x in (q, k, v)
    )
    out = sdpa(q_, k_, v_, of_padded, window, dropout)
    return select_rows(out.flatten(2).flatten(0, 1), places).view(*q.shape[:3], v.shape[-1])


def varlen(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, window: int | None = None, dropout: float = 0.0) -> Tensor:
    """torch's ``varlen_attn``: bf16 or fp16 on a GPU. What it does not support, such as dropout, is computed by ``sdpa``.

    So are rows that are not packed: torch's fused kernel needs no mask for them.
    """
    window = effective_window(window, k.shape[1])
    if (mask.is_causal and window is None) or not varlen_supports(q.shape[-1], dropout):
        return sdpa(q, k, v, mask, window, dropout)
    rows, length = q.shape[:2]
    if mask.is_causal:
        ends, longest = torch.arange(rows + 1, dtype=torch.int32, device=q.device) * length, length
    else:
        documents = mask.found_boundaries()
        ends, longest = documents.cu_seqlens, documents.longest
    q, k, v = (rearrange(x, "b t h d -> (b t) h d") for x in (q, k, v))
    return rearrange(causal_varlen(q, k, v, (ends, ends), (longest, longest), window), "(b t) h d -> b t h d", b=rows)


def causal_varlen(
    q: Tensor, k: Tensor, v: Tensor, ends: tuple[Tensor, Tensor], longest: tuple[int, int], window: int | None
) -> Tensor:
    """``varlen_attn`` of sequences one after the other, whose queries are their last positions.

    Args:
        q: (sum of queries, H, D).
        k: (sum of keys, K, D).
        v: likewise.
        ends: cumulative numbers of queries and of keys, (sequences + 1,) int32 each.
        longest: largest number of queries and of keys.
        window: positions that a query attends to; None for all up to its own.

    Returns:
        (sum of queries, H, D).
    """
    from torch.nn.attention.varlen import varlen_attn

    sides = (-1 if window is None else window - 1, 0)  # positions attended to the left and right; -1 for all
    out = varlen_attn(q, k, v, *ends, *longest, window_size=sides, enable_gqa=q.shape[1] != k.shape[1])
    return cast(Tensor, out)


def varlen_supports(head_dim: int, dropout: float) -> bool:
    """Whether ``varlen_attn`` supports these heads and this dropout; else ``sdpa`` takes its place."""
    return not dropout and head_dim % 8 == 0 and head_dim <= 256


def flash(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, window: int | None = None, dropout: float = 0.0) -> Tensor:
    """flash-attn (arXiv 2307.08691): bf16 or fp16 on a GPU."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    sides = (-1, -1) if window is None else (window - 1, 0)  # positions attended to the left and right; -1 for all
    deterministic = torch.are_deterministic_algorithms_enabled()  # else the backward pass adds in any order
    if mask.documents is None:
        return flash_attn_func(
            q, k, v, causal=True, window_size=sides, dropout_p=dropout, deterministic=deterministic
        )  # fmt: skip
    documents = mask.found_boundaries()
    ends, longest = documents.cu_seqlens, documents.longest
    flat = (rearrange(x, "b t h d -> (b t) h d") for x in (q, k, v))
    out = flash_attn_varlen_func(
        *flat, ends, ends, longest, longest,
        causal=True, window_size=sides, dropout_p=dropout, deterministic=deterministic,
    )  # fmt: skip
    return rearrange(out, "(b t) h d -> b t h d", b=q.shape[0])


def flash3(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, window: int | None = None, dropout: float = 0.0) -> Tensor:
    """FlashAttention-3: bf16 or fp16 on an H100 or H200. It has no dropout, with which ``sdpa`` computes the attention."""
    if dropout or q.shape[-1] % 8 or q.shape[-1] > 256:
        return sdpa(q, k, v, mask, window, dropout)
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    sides = (-1, -1) if window is None else (window - 1, 0)  # positions attended to the left and right; -1 for all
    deterministic = torch.are_deterministic_algorithms_enabled()
    if mask.documents is None:
        return _output(flash_attn_func(q, k, v, causal=True, window_size=sides, deterministic=deterministic))
    documents = mask.found_boundaries()
    ends, longest = documents.cu_seqlens, documents.longest
    flat = (rearrange(x, "b t h d -> (b t) h d") for x in (q, k, v))
    out = flash_attn_varlen_func(
        *flat, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=longest, max_seqlen_k=longest,
        causal=True, window_size=sides, deterministic=deterministic,
    )  # fmt: skip
    return rearrange(_output(out), "(b t) h d -> b t h d", b=q.shape[0])


def _output(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The attention of FlashAttention-3, whose first releases return the logsumexp as well."""
    return result[0] if isinstance(result, tuple) else result


KERNELS: dict[str, Kernel] = {"naive": naive, "sdpa": sdpa, "varlen": varlen, "flash": flash, "flash3": flash3}
OF_GPUS = ("flash3", "flash", "varlen")  # they compute in bf16 or fp16 on a GPU; auto takes the first that can run


def problems(kernel: str, dtype: torch.dtype | None) -> list[str]:
    """Return the reasons why a kernel cannot run here; none if it can. None is a dtype that is not known yet."""
    if kernel not in OF_GPUS:
        return []
    reasons = list(machine_problems()[kernel])
    if dtype not in (None, torch.bfloat16, torch.float16):
        reasons.append(f"it computes in bf16 or fp16, not in {str(dtype).removeprefix('torch.')}")
    return reasons


PACKAGES = {  # name, module and how to install it
    "flash": ("flash-attn", "flash_attn", "pip install flash-attn --no-build-isolation"),
    "flash3": ("flash-attn-3", "flash_attn_interface", "build it from hopper/ of Dao-AILab/flash-attention"),
}
_machine_problems: dict[str, list[str]] | None = None  # not functools.cache: torch.compile calls what it wraps


def machine_problems() -> dict[str, list[str]]:
    """Return why kernels cannot run on this machine, in any dtype. Computed once, since every attention call reads it."""
    global _machine_problems
    if _machine_problems is None:
        _machine_problems = {name: [*_import_problems(name), *_gpu_problems(name)] for name in OF_GPUS}
    return _machine_problems


def _gpu_problems(name: str) -> list[str]:
    if not torch.cuda.is_available():
        return ["no GPU is visible"]
    capability = torch.cuda.get_device_capability()
    if name == "flash3":
        return [] if capability[0] == 9 else ["it needs a GPU of compute capability 9.0 (H100, H200)"]
    return ["it needs a GPU of compute capability 8.0 (A100) or above"] if capability < (8, 0) else []


def _import_problems(name: str) -> list[str]:
    """A package may be found and yet fail, as when it was built for another torch, or is only flash-attn-4."""
    if name == "varlen":
        if not find_spec("torch.nn.attention.varlen"):
            return ["torch is too old"]
        from torch.nn.attention.varlen import varlen_attn

        missing = {"window_size", "enable_gqa"} - signature(varlen_attn).parameters.keys()
        return [f"torch is too old: its varlen_attn has no {', '.join(sorted(missing))}"] if missing else []
    package, module, install = PACKAGES[name]
    try:
        imported = import_module(module)
        for function in ("flash_attn_func", "flash_attn_varlen_func"):
            getattr(imported, function)
    except ModuleNotFoundError as error:
        if error.name == module:
            return [f"the {package} package is not installed ({install})"]
        return [f"the {package} package cannot be imported: {error}"]
    except (ImportError, AttributeError, OSError) as error:  # undefined symbols, or a missing library
        return [f"the {package} package cannot be imported: {str(error).splitlines()[0]}"]
    return []


def select_kernel(name: str, dtype: torch.dtype | None) -> str:
    """Resolve a kernel name: ``auto`` is FlashAttention-3 or -2 if it can run, else torch's varlen, else its SDPA.

    Args:
        name: auto, or a key of KERNELS.
        dtype: of queries, keys and values; None if it is not known yet.

    Raises:
        ValueError: ``name`` is unknown, or cannot run here.
    """
    if name == "auto":
        return next(kernel for kernel in (*OF_GPUS, "sdpa") if not problems(kernel, dtype))
    if name not in KERNELS:
        raise ValueError(f"unknown attention {name!r}; available: auto, {', '.join(KERNELS)}")
    if reasons := problems(name, dtype):
        raise ValueError(f"attention {name!r} cannot run: {'; '.join(reasons)}")
    return name


def kernel_of(model: nn.Module, dtype: torch.dtype) -> str | None:
    """The kernel that a model uses for queries of a dtype; None for a model that does not choose one of ours."""
    attention = getattr(model, "attention", None)
    return select_kernel(attention, dtype) if isinstance(attention, str) else None
