"""Grouped-query attention (arXiv 2305.13245) with rotary positions.

Shapes: B rows, T queries, S keys, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from bumblebee.nn import batch_invariant
from bumblebee.nn.attention_kernels import KERNELS, AttentionMask, select_kernel
from bumblebee.nn.rope import apply_rotary, apply_rotary_interleaved


class LayerCache(Protocol):
    """Interface of one layer's KV cache: store new keys and values, and attend over everything stored."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """``q``: (B, T, H, D), ``k``, ``v``: (B, T, K, D) of the new positions -> (B, T, H, D).

        Each query attends to its own sequence up to its own position, cached positions included, or to the last ``window`` of
        these positions.
        """
        ...


class Attention(nn.Module):
    """Causal self-attention.

    Args:
        hidden_size: width of input and output.
        num_heads: H.
        num_kv_heads: K; divides H.
        head_dim: D.
        bias: biases on the query, key and value projections.
        output_bias: bias on the output projection.
        kernel: ``auto``, ``flash3``, ``flash``, ``varlen``, ``sdpa`` or ``naive``. ``auto`` is resolved in forward, where the
            dtype is known.
        q_norm: norm of each query head before rotation (QK-norm, arXiv 2302.05442); None for no norm.
        k_norm: norm of each key head.
        interleaved: rotate adjacent pairs, as in GLM; see ``bumblebee/nn/rope.py``.
        window: sliding window: number of positions that a query attends to, its own included; None for all.
        dropout: dropout probability of attention weights, in training.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool = False,
        output_bias: bool = False,
        kernel: str = "auto",
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        interleaved: bool = False,
        window: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.kernel = kernel
        self.rotate = apply_rotary_interleaved if interleaved else apply_rotary
        self.window = window
        self.dropout = dropout
        self.q_norm = q_norm or nn.Identity()
        self.k_norm = k_norm or nn.Identity()
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=output_bias)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: AttentionMask, cache: LayerCache | None = None
    ) -> Tensor:
        """(B, T, hidden_size) -> (B, T, hidden_size).

        Args:
            x: hidden states.
            rotary: cosines and sines, (B, T, 1, D/2) or narrower; None for no rotation (no positional encoding).
            mask: which keys each query attends to. Ignored with a cache.
            cache: stores the new keys and values and computes the attention.
        """
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = self.rotate(q, *rotary), self.rotate(k, *rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast, norms return fp32, in which flash-attn cannot run
        if cache is not None:
            out = cache.attend(q, k, v, self.window)
        elif batch_invariant.is_batch_invariant():
            out = batch_invariant.attention(q, k, v, self._visible(q, mask))
        else:
            dropout = self.dropout if self.training else 0.0
            out = KERNELS[select_kernel(self.kernel, q.dtype)](q, k, v, mask, self.window, dropout)
        return self.o_proj(out.flatten(-2))

    def _visible(self, q: Tensor, mask: AttentionMask) -> Tensor:
        """Which keys queries (B, T, H, D) attend to: (B or 1, T, T), for ``batch_invariant``."""
        if not mask.is_causal:
            raise ValueError("batch_invariant: does not support packed rows")
        if self.dropout and self.training:
            raise ValueError(f"batch_invariant: does not support attention_dropout, which is {self.dropout}")
        return mask.dense(q.shape[1], q.shape[1], q.device, self.window)[:, 0]
