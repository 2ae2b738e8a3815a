"""Rotary position embedding (arXiv 2104.09864) in Hugging Face's half-split layout.

A head's vector is read as pairs (x[i], x[i + D/2]); the pair i of a token at position p is turned by the angle
p * theta^(-2i/D). Frequencies and angles are fp32 whatever the model's dtype: in bf16 the angles of far positions are wrong.
For the same reason the frequencies are no buffer, which ``model.to(bf16)`` or DeepSpeed would cast.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Cosines and sines for given positions.

    Args:
        head_dim: D, the width of one head.
        theta: base of the frequencies.
        scaling: None, or Hugging Face's rope settings with "rope_type" (``default`` or ``llama3``).
    """

    def __init__(self, head_dim: int, theta: float, scaling: dict[str, Any] | None = None) -> None:
        super().__init__()
        frequencies = rotary_frequencies(head_dim, theta)
        if scaling is not None and scaling["rope_type"] == "llama3":
            frequencies = llama3_frequencies(frequencies, scaling)
        self._frequencies = frequencies

    @torch.no_grad()
    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """``position_ids`` (B, T) -> cosines and sines, each (B, T, 1, D/2) in fp32."""
        if self._frequencies.device != position_ids.device:
            self._frequencies = self._frequencies.to(position_ids.device)  # once: the first forward on a device
        angles = (position_ids[..., None].float() * self._frequencies)[:, :, None, :]
        return angles.cos(), angles.sin()


def rotary_frequencies(head_dim: int, theta: float) -> Tensor:
    """theta^(-2i/D) for i < D/2: (D/2,) in fp32, on the CPU even when a model is built on the meta device."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)


def llama3_frequencies(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1's rule: long wavelengths are stretched by ``factor``, short ones kept, those between interpolated."""
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    kept = ((original / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair of ``x`` (B, T, H, D) by its angle; ``cos`` and ``sin`` are (B, T, 1, D/2). The dtype of x is kept."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
