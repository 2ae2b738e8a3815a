"""Rotary position embeddings (RoPE, arXiv 2104.09864) and their scaling to longer contexts.

The first D dimensions of a head are read as pairs; pair i of a token at position p is rotated by the angle p * theta^(-2i/D).
Hugging Face's usual layout pairs (x[i], x[i + D/2]), GLM's adjacent dimensions (x[2i], x[2i + 1]). Frequencies and angles are
fp32 whatever the model's dtype: in bf16 the angles of distant positions are wrong. For the same reason the frequencies are not
a buffer, which ``model.to(bf16)`` or DeepSpeed would cast. Rotary embeddings have no hard length limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Scaling = dict[str, Any]  # rope_scaling of config.json, checked by BumblebeeConfig


class RotaryEmbedding(nn.Module):
    """Computes cosines and sines of position ids.

    Args:
        dim: D, number of rotated dimensions of a head.
        theta: base of the frequencies.
        scaling: None, or Hugging Face's ``rope_scaling`` with a "rope_type" of ``SCALINGS``.
    """

    def __init__(self, dim: int, theta: float, scaling: Scaling | None = None) -> None:
        super().__init__()
        scaling = scaling or {"rope_type": "default"}
        self._frequencies, self.factor = SCALINGS[scaling["rope_type"]](dim, theta, scaling)

    @torch.no_grad()
    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """``position_ids`` (B, T) -> cosines and sines, each (B, T, 1, D/2) in fp32."""
        if self._frequencies.device != position_ids.device:
            self._frequencies = self._frequencies.to(position_ids.device)  # on the first forward pass on a device
        angles = (position_ids[..., None].float() * self.frequencies(position_ids))[:, :, None, :]
        return angles.cos() * self.factor, angles.sin() * self.factor

    def frequencies(self, position_ids: Tensor) -> Tensor:
        """Return the frequencies (D/2,) for these positions."""
        return self._frequencies


class DynamicRotaryEmbedding(RotaryEmbedding):
    """Dynamic NTK scaling (proposed on r/LocalLLaMA): the base grows with the sequence beyond the model's context length.

    Up to ``max_positions`` L tokens nothing is scaled. A batch whose longest sequence has S > L tokens uses the base
    theta * (factor * S / L - (factor - 1))^(D / (D - 2)), computed for each batch: unlike in transformers, a shorter batch
    after a longer one gets its own base. Cached keys are rotated before S is known, so generation is limited to L tokens.

    Args:
        dim: D.
        theta: base of the frequencies.
        factor: "factor" of ``rope_scaling``.
        max_positions: L.
    """

    def __init__(self, dim: int, theta: float, factor: float, max_positions: int) -> None:
        super().__init__(dim, theta)
        self.base = lambda length: theta * (factor * length / max_positions - (factor - 1)) ** (dim / (dim - 2))
        self.dim, self.max_positions = dim, max_positions

    def frequencies(self, position_ids: Tensor) -> Tensor:
        """Frequencies of the formula above, computed without a GPU synchronization."""
        length = (position_ids.max() + 1).clamp(min=self.max_positions).float()
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=position_ids.device) / self.dim
        return 1.0 / self.base(length) ** exponents


def rotary_frequencies(dim: int, theta: float) -> Tensor:
    """theta^(-2i/D) for i < D/2: (D/2,) in fp32, on the CPU even if the model is built on the meta device."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)


def _default(dim: int, theta: float, scaling: Scaling) -> tuple[Tensor, float]:
    return rotary_frequencies(dim, theta), 1.0


def _linear(dim: int, theta: float, scaling: Scaling) -> tuple[Tensor, float]:
    """Position interpolation: stretch every wavelength by ``factor`` (arXiv 2306.15595)."""
    return rotary_frequencies(dim, theta) / scaling["factor"], 1.0


def _llama3(dim: int, theta: float, scaling: Scaling) -> tuple[Tensor, float]:
    """Llama 3.1: stretch long wavelengths by ``factor``, keep short ones, interpolate in between."""
    frequencies = rotary_frequencies(dim, theta)
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    kept = ((original / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / factor, 1.0


def _yarn(dim: int, theta: float, scaling: Scaling) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): keep pairs that rotate often within the original context, stretch those that rotate rarely."""
    frequencies = rotary_frequencies(dim, theta)
    original = scaling["original_max_position_embeddings"]

    def pair_with_rotations(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_with_rotations(scaling.get("beta_fast") or 32)
    high = pair_with_rotations(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    stretched = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (1 - stretched) + frequencies / scaling["factor"] * stretched, _yarn_factor(scaling)


def _yarn_factor(scaling: Scaling) -> float:
    """Attention temperature of YaRN (its equation 22), as a factor of cosines and sines."""
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)


# rope_type -> function from (D, theta, scaling) to frequencies (D/2,) and a factor of cosines and sines
SCALINGS: dict[str, Callable[[int, float, Scaling], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
}


def rotary_embedding(dim: int, theta: float, scaling: Scaling | None, max_positions: int) -> RotaryEmbedding:
    """Build the embedding that Hugging Face's ``rope_scaling`` describes.

    Args:
        dim: D.
        theta: base of the frequencies.
        scaling: None, or a dict with a "rope_type" of ``SCALINGS`` or "dynamic".
        max_positions: the model's context length in tokens.
    """
    if scaling is not None and scaling["rope_type"] == "dynamic":
        return DynamicRotaryEmbedding(dim, theta, scaling["factor"], max_positions)
    return RotaryEmbedding(dim, theta, scaling)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) by their angles. Dimensions beyond D are unchanged.

    Args:
        x: (B, T, H, D or more); the result has its dtype.
        cos: (B, T, 1, D/2).
        sin: (B, T, 1, D/2).
    """
    dim = 2 * cos.shape[-1]
    first, second = x[..., :dim].float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return rotated if dim == x.shape[-1] else torch.cat((rotated, x[..., dim:]), dim=-1)


def apply_rotary_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs (x[2i], x[2i + 1]), as in GLM; otherwise like ``apply_rotary``."""
    dim = 2 * cos.shape[-1]
    first, second = x[..., :dim].float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2).to(x.dtype)
    return rotated if dim == x.shape[-1] else torch.cat((rotated, x[..., dim:]), dim=-1)
