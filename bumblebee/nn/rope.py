"""Rotary position embedding (arXiv 2104.09864) and the ways to stretch it to longer texts.

A head's vector, or its first part, is read as pairs; the pair i of a token at position p is turned by the angle
p * theta^(-2i/D). In Hugging Face's usual layout the pairs are (x[i], x[i + D/2]), in GLM's (x[2i], x[2i + 1]). Frequencies and
angles are fp32 whatever the model's dtype: in bf16 the angles of far positions are wrong. For the same reason the frequencies
are no buffer, which ``model.to(bf16)`` or DeepSpeed would cast. D is the width of what is turned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Scaling = dict[str, Any]


class RotaryEmbedding(nn.Module):
    """Cosines and sines for given positions.

    Args:
        dim: D, the width of one head, or of the part of it that is turned.
        theta: base of the frequencies.
        scaling: None, or Hugging Face's rope settings with "rope_type", one of ``SCALINGS``.
    """

    def __init__(self, dim: int, theta: float, scaling: Scaling | None = None) -> None:
        super().__init__()
        scaling = scaling or {"rope_type": "default"}
        self._frequencies, self.factor = SCALINGS[scaling["rope_type"]](dim, theta, scaling)

    @torch.no_grad()
    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """``position_ids`` (B, T) -> cosines and sines, each (B, T, 1, D/2) in fp32."""
        if self._frequencies.device != position_ids.device:
            self._frequencies = self._frequencies.to(position_ids.device)  # once: the first forward on a device
        angles = (position_ids[..., None].float() * self.frequencies(position_ids))[:, :, None, :]
        return angles.cos() * self.factor, angles.sin() * self.factor

    def frequencies(self, position_ids: Tensor) -> Tensor:
        """(D/2,), those of a forward pass over these positions."""
        return self._frequencies


class DynamicRotaryEmbedding(RotaryEmbedding):
    """Frequencies that fall as the text grows beyond the model's length ("dynamic NTK", from the forum of LocalLLaMA).

    Up to ``max_positions`` L nothing is scaled. A batch whose longest text has S > L tokens is computed with the base
    theta * (factor * S / L - (factor - 1))^(D / (D - 2)), anew for each batch: unlike in transformers, a shorter batch after a
    longer one gets its own base. Keys of a cache were turned before S was known, so texts are generated up to L only.

    Args:
        dim: D.
        theta: base of the frequencies.
        factor: of ``scaling``.
        max_positions: L.
    """

    def __init__(self, dim: int, theta: float, factor: float, max_positions: int) -> None:
        super().__init__(dim, theta)
        self.growth = lambda length: theta * (factor * length / max_positions - (factor - 1)) ** (dim / (dim - 2))
        self.dim, self.max_positions = dim, max_positions

    def frequencies(self, position_ids: Tensor) -> Tensor:
        """The formula above, without waiting for a GPU to know the length."""
        length = (position_ids.max() + 1).clamp(min=self.max_positions).float()
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=position_ids.device) / self.dim
        return 1.0 / self.growth(length) ** exponents


def rotary_frequencies(dim: int, theta: float) -> Tensor:
    """theta^(-2i/D) for i < D/2: (D/2,) in fp32, on the CPU even when a model is built on the meta device."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)


def _default(dim: int, theta: float, scaling: Scaling) -> tuple[Tensor, float]:
    return rotary_frequencies(dim, theta), 1.0


def _linear(dim: int, theta: float, scaling: Scaling) -> tuple[Tensor, float]:
    """Every wavelength stretched by ``factor`` (arXiv 2306.15595)."""
    return rotary_frequencies(dim, theta) / scaling["factor"], 1.0


def _llama3(dim: int, theta: float, scaling: Scaling) -> tuple[Tensor, float]:
    """Llama 3.1's rule: long wavelengths are stretched by ``factor``, short ones kept, those between interpolated."""
    frequencies = rotary_frequencies(dim, theta)
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    kept = ((original / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / factor, 1.0


def _yarn(dim: int, theta: float, scaling: Scaling) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): pairs that turn often in the original length are kept, those that hardly turn are stretched."""
    frequencies = rotary_frequencies(dim, theta)
    original = scaling["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_that_turns(scaling.get("beta_fast") or 32)
    high = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    stretched = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (1 - stretched) + frequencies / scaling["factor"] * stretched, _yarn_factor(scaling)


def _yarn_factor(scaling: Scaling) -> float:
    """What cosines and sines are multiplied with, so that attention over a longer text stays as sharp (its equation 22)."""
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)


# rope_type -> (D, theta, settings) -> frequencies (D/2,) and what cosines and sines are multiplied with
SCALINGS: dict[str, Callable[[int, float, Scaling], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
}


def rotary_embedding(dim: int, theta: float, scaling: Scaling | None, max_positions: int) -> RotaryEmbedding:
    """The embedding that Hugging Face's rope settings ask for.

    Args:
        dim: D.
        theta: base of the frequencies.
        scaling: None, or a dict with "rope_type": one of ``SCALINGS``, or "dynamic".
        max_positions: the length that the model was made for.
    """
    if scaling is not None and scaling["rope_type"] == "dynamic":
        return DynamicRotaryEmbedding(dim, theta, scaling["factor"], max_positions)
    return RotaryEmbedding(dim, theta, scaling)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair (x[i], x[i + D/2]) by its angle; what lies behind D is kept as it is.

    Args:
        x: (B, T, H, D or more); its dtype is also the result's.
        cos: (B, T, 1, D/2).
        sin: (B, T, 1, D/2).
    """
    dim = 2 * cos.shape[-1]
    first, second = x[..., :dim].float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return turned if dim == x.shape[-1] else torch.cat((turned, x[..., dim:]), dim=-1)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As ``rotate``, where the pairs are (x[2i], x[2i + 1])."""
    dim = 2 * cos.shape[-1]
    first, second = x[..., :dim].float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2).to(x.dtype)
    return turned if dim == x.shape[-1] else torch.cat((turned, x[..., dim:]), dim=-1)
