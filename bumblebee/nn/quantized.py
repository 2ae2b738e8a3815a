"""Weight-only quantization for inference: linear layers and embeddings whose weights are int8 or int4.

    int8    one scale per output channel     w = scale[n] * code,                     code in -127 ... 127
    int4    scale and zero per 32 inputs     w = scale[n, g] * code + zero[n, g],     code in -8 ... 7

Activations keep their precision. Scales and zeros of int4 are bf16, as torch's int4 operators require, so a weight takes 5
bits. They are first set by the minimum and maximum of each group, then fitted once to the codes by least squares, which
removes a tenth of the squared error.

A weight is an object with ``matmul`` and ``dequantize``. The ones here dequantize in each call, which is right on any device;
``bumblebee/inference/placement/quantized_kernels.py`` replaces them by faster ones. In a state dict a quantized layer is an
ordinary one, with the dequantized weight. Shapes: N outputs, K inputs, G = K / 32 groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bumblebee.nn import IGNORE_INDEX

Scheme = Literal["int8", "int4"]
GROUP_SIZE = 32  # inputs that share a scale in int4
BYTES_INT4 = 0.5 + 4 / GROUP_SIZE  # per weight, with its share of a scale and a zero
_ELEMENTS = 2**20  # of a weight that are quantized at a time
_LOSS_ROWS = 1024  # rows of fp32 logits at a time

Weight = TypeVar("Weight", bound="QuantizedWeight")


class QuantizedWeight(nn.Module):
    """A quantized weight (N, K). Its tensors are buffers: they follow the module to a device, and no optimizer sees them."""

    scheme: ClassVar[Scheme]
    shape: tuple[int, int]

    @classmethod
    def of(cls: type[Weight], weight: Tensor) -> Weight:
        """Quantize a weight (N, K), some rows at a time: copies of all of it in fp32 would take many times its memory."""
        rows = max(1, _ELEMENTS // weight.shape[1])
        return cls.cat([cls._of_rows(part.float()) for part in weight.detach().split(rows)])

    @classmethod
    def _of_rows(cls: type[Weight], weight: Tensor) -> Weight:
        """Quantize rows (n, K) in fp32."""
        raise NotImplementedError

    @classmethod
    def cat(cls: type[Weight], weights: Sequence[Weight]) -> Weight:
        """The rows of several weights of this class, one below the other."""
        return cls(*(torch.cat(parts) for parts in zip(*(list(weight.buffers()) for weight in weights), strict=True)))

    def matmul(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) in the dtype of ``x``."""
        return F.linear(x, self.dequantize().to(x.dtype))

    def dequantize(self) -> Tensor:
        """The weight (N, K) in fp32."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """Save nothing: the layer saves the dequantized weight."""


class Int8Weight(QuantizedWeight):
    """Symmetric, one scale per row.

    Args:
        codes: (N, K) int8.
        scale: (N,) fp32.
    """

    scheme = "int8"

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.shape = (codes.shape[0], codes.shape[1])
        self.codes: Tensor
        self.scale: Tensor
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    @classmethod
    def _of_rows(cls, weight: Tensor) -> Int8Weight:
        scale = weight.abs().amax(dim=1).div(127).clamp_min(torch.finfo(torch.float32).tiny)
        return cls((weight / scale[:, None]).round_().to(torch.int8), scale)

    def matmul(self, x: Tensor) -> Tensor:
        """See the base class. Scales the outputs, which are fewer than the weights."""
        return (F.linear(x, self.codes.to(x.dtype)) * self.scale).to(x.dtype)

    def dequantize(self) -> Tensor:
        """See the base class."""
        return self.codes * self.scale[:, None]

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the weight in fp32: (...) int64 -> (..., K)."""
        return self.codes[index] * self.scale[index][..., None]


class Int4Weight(QuantizedWeight):
    """Asymmetric, one scale and zero per row and group of ``GROUP_SIZE`` inputs, whose number is a multiple of it.

    Args:
        codes: (N, K / 2) uint8: two codes plus 8 per byte, the even input's in the high half.
        scale: (N, G) bf16.
        zero: (N, G) bf16.
    """

    scheme = "int4"

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor) -> None:
        super().__init__()
        self.shape = (codes.shape[0], 2 * codes.shape[1])
        self.codes: Tensor
        self.scale: Tensor
        self.zero: Tensor
        for name, tensor in (("codes", codes), ("scale", scale), ("zero", zero)):
            self.register_buffer(name, tensor)

    @classmethod
    def _of_rows(cls, weight: Tensor) -> Int4Weight:
        groups = weight.unflatten(1, (-1, GROUP_SIZE))
        low, high = groups.aminmax(dim=-1, keepdim=True)
        scale = (high - low) / 15
        codes = _codes(groups, *_stored(scale, low + 8 * scale))
        scale, zero = _stored(*_fit(groups, codes))
        codes = _codes(groups, scale, zero).add_(8).to(torch.uint8).flatten(1)
        return cls(codes[:, ::2] << 4 | codes[:, 1::2], scale.squeeze(-1).bfloat16(), zero.squeeze(-1).bfloat16())

    def unpacked(self) -> Tensor:
        """The codes plus 8: (N, K) uint8."""
        return torch.stack([self.codes >> 4, self.codes & 15], dim=-1).flatten(1)

    def dequantize(self) -> Tensor:
        """See the base class."""
        groups = self.unpacked().unflatten(1, (-1, GROUP_SIZE)).float() - 8
        return torch.addcmul(self.zero.float()[..., None], groups, self.scale.float()[..., None]).flatten(1)


def _stored(*values: Tensor) -> tuple[Tensor, ...]:
    """Values as they are after storing them in bf16."""
    return tuple(value.bfloat16().float() for value in values)


def _codes(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest codes (N, G, 32); groups of equal values have scale 0."""
    return ((groups - zero) / torch.where(scale == 0, 1, scale)).round_().clamp_(-8, 7)


def _fit(groups: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero with the smallest squared error for these codes: the regression line of each group, (N, G, 1) each."""
    code_mean, mean = codes.mean(-1, keepdim=True), groups.mean(-1, keepdim=True)
    deviation = codes - code_mean
    variance = deviation.square().sum(-1, keepdim=True)
    scale = (deviation * (groups - mean)).sum(-1, keepdim=True) / torch.where(variance == 0, 1, variance)
    return scale, mean - scale * code_mean


# -- modules -------------------------------------------------------------------------------------------------------------


class QuantizedLinear(nn.Module):
    """A linear layer, or a head, with a quantized weight; for inference only.

    Args:
        weight: (N, K).
        bias: (N,) or None.
        dtype: dtype of the weight in state dicts.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.quantized, self.dtype = weight, dtype
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)

    @property
    def hidden_parameters(self) -> int:
        """Number of weights outside ``parameters()``."""
        return self.out_features * self.in_features

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """(..., K) -> (..., N). A head that is called with labels returns token losses, see ``LMHead``."""
        if labels is not None:
            return token_losses(self, x, labels)
        out = self.quantized.matmul(x)
        return out if self.bias is None else out + self.bias

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.quantized.dequantize().to(self.dtype)
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantizedEmbedding(nn.Module):
    """An embedding table in int8.

    Args:
        weight: (V, D).
        dtype: dtype of the outputs.
    """

    def __init__(self, weight: Int8Weight, dtype: torch.dtype) -> None:
        super().__init__()
        self.quantized, self.dtype = weight, dtype

    @property
    def hidden_parameters(self) -> int:
        """Zero: the head, which has the same weight, counts it."""
        return 0

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., D)."""
        return self.quantized.rows(ids).to(self.dtype)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.quantized.dequantize().to(self.dtype)


def token_losses(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return ``-log p(label)`` in fp32, 0 where the label is -100: (B, T, K) and (B, T) -> (B, T)."""
    losses = [
        F.cross_entropy(head(rows).float(), targets, ignore_index=IGNORE_INDEX, reduction="none")
        for rows, targets in zip(hidden.flatten(0, -2).split(_LOSS_ROWS), labels.flatten().split(_LOSS_ROWS), strict=True)
    ]
    return torch.cat(losses).view(labels.shape)
