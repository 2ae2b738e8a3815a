"""Fast matmuls for quantized layers, chosen per device after loading.

On x86 CPUs with AVX-512 VNNI and a C++ compiler: ``vnni_weights.py``, for int8 and int4.

int8 on other x86 CPUs: FBGEMM's int8 matmul, which also takes its activations in 8 bits. Each row of activations is therefore
split into two digits of 8 bits, which are two rows of one matmul: together they hold 16 bits of fixed point, more than bf16
has. The products are summed exactly, so that a row's result does not depend on the other rows. torch's weight-only operator
``_weight_int8pack_mm`` is no faster at the 0.5B shape.

int4 on other CPUs and on GPUs of compute capability 8.0 or above: torch's ``_weight_int4pack_mm``, which computes in bf16.

Everything else dequantizes the weight in each call, which saves memory, not time; a log line says so. torch's int8 operator for
CUDA, one thread per output with uncoalesced reads, is not used. Weights are packed one after the other, and each original is
freed.
"""

from __future__ import annotations

import logging
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from bumblebee.inference.placement import vnni_weights
from bumblebee.inference.placement.shared_matmul import SharedLinear, SharedMatmul, groups_of, joined_biases, share_matmul
from bumblebee.inference.placement.vnni_weights import VnniInt4Weight, VnniInt8Weight
from bumblebee.nn.quantized import (
    GROUP_SIZE,
    Int4Weight,
    Int8Weight,
    QuantizedLinear,
    QuantizedWeight,
    token_losses,
)

logger = logging.getLogger(__name__)

_SMALLEST = 1e-30  # largest activation of a row in int8: what lies below is zero, and its reciprocal is finite
_ROW_BLOCK = 16  # rows of a weight must be a multiple of it for the int4 operators


# -- int8 on the CPU -----------------------------------------------------------------------------------------------------


class FbgemmInt8Weight(QuantizedWeight):
    """An int8 weight packed for FBGEMM.

    Args:
        weight: on the CPU.
        has_vnni: the CPU multiplies 8-bit integers without saturation; otherwise a digit has 7 bits.
    """

    scheme = "int8"

    def __init__(self, weight: Int8Weight, has_vnni: bool) -> None:
        super().__init__()
        self.shape = weight.shape
        self.digit = 127 if has_vnni else 63  # digits are -digit ... digit
        self.base = 2 * self.digit
        unit = 1 / (self.digit * self.base)  # of fixed point, relative to a row's largest activation
        self.packed = _fbgemm_pack(weight.codes, weight.scale * unit)
        self.scale: Tensor
        self.limits: Tensor
        self.register_buffer("scale", weight.scale)
        self.register_buffer("limits", torch.tensor([self.digit, self.digit * self.base], dtype=torch.float32))

    def matmul(self, x: Tensor) -> Tensor:
        """See the base class. Few and cheap operators: in decode, each of them costs as much as a twentieth of the product."""
        largest = x.abs().amax(-1, keepdim=True).clamp_min_(max(_SMALLEST, torch.finfo(x.dtype).tiny))
        digits = x * (self.limits.view(2, *[1] * x.dim()) / largest)  # (2, ..., K): in units of each digit
        high, low = digits.unbind()
        low.sub_(high.round_(), alpha=self.base)  # the operator rounds it
        high, low = _fbgemm_matmul(digits, 1.0, self.digit + 1, self.packed).unbind()  # the zero point makes digits unsigned
        return low.add_(high, alpha=self.base).mul_(largest).to(x.dtype)

    def dequantize(self) -> Tensor:
        """See the base class."""
        codes = torch.ops.quantized.linear_unpack(self.packed)[0].int_repr()
        return codes * self.scale[:, None]


_fbgemm_matmul = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32


@cache
def has_fbgemm() -> bool:
    """Whether torch's int8 matmul of FBGEMM can run."""
    return platform.machine() in ("x86_64", "AMD64") and "fbgemm" in torch.backends.quantized.supported_engines


def _fbgemm_pack(codes: Tensor, scale: Tensor) -> torch.ScriptObject:
    with _quantized_engine("fbgemm"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")  # deprecated without a successor
        zero = torch.zeros(len(codes), dtype=torch.int64)
        quantized = torch._make_per_channel_quantized_tensor(codes.contiguous(), scale.double(), zero, 0)
        return torch.ops.quantized.linear_prepack(quantized, None)


@contextmanager
def _quantized_engine(name: str) -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


# -- int4 ----------------------------------------------------------------------------------------------------------------


class PackedInt4Weight(QuantizedWeight):
    """An int4 weight packed for torch's operators, which take and return bf16.

    Args:
        weight: on its device.
    """

    scheme = "int4"

    def __init__(self, weight: Int4Weight) -> None:
        super().__init__()
        self.shape = weight.shape
        padding = -self.shape[0] % _ROW_BLOCK
        self.packed: Tensor
        self.scale_and_zero: Tensor
        on_cpu = weight.codes.device.type == "cpu"
        pack, self.operator = (_pack_for_cpu, _matmul_on_cpu) if on_cpu else (_pack_for_cuda, _matmul_on_cuda)
        self.register_buffer("packed", pack(weight, padding))
        scale_and_zero = torch.stack([weight.scale.T, weight.zero.T], dim=-1)  # (G, N, 2)
        self.register_buffer("scale_and_zero", nn.functional.pad(scale_and_zero, (0, 0, 0, padding)).contiguous())

    def matmul(self, x: Tensor) -> Tensor:
        """See the base class."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        out = self.operator(rows.contiguous(), self.packed, self.scale_and_zero)[:, : self.shape[0]]
        return out.to(x.dtype).view(*x.shape[:-1], -1)

    def dequantize(self) -> Tensor:
        """See the base class. The layout is the operator's own: the weight is read by multiplying with the unit matrix."""
        inputs = torch.eye(self.shape[1], dtype=torch.bfloat16, device=self.packed.device)
        codes_only = torch.ones_like(self.scale_and_zero)
        codes_only[..., 1] = 0
        codes = self.operator(inputs, self.packed, codes_only)[:, : self.shape[0]].T.float().unflatten(1, (-1, GROUP_SIZE))
        scale, zero = self.scale_and_zero[:, : self.shape[0]].float().permute(2, 1, 0)[..., None]
        return torch.addcmul(zero, codes, scale).flatten(1)


def _pack_for_cpu(weight: Int4Weight, padding: int) -> Tensor:
    codes = nn.functional.pad(weight.unpacked(), (0, 0, 0, padding)).to(torch.int32)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)


def _matmul_on_cpu(x: Tensor, packed: Tensor, scale_and_zero: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP_SIZE, scale_and_zero)


def _pack_for_cuda(weight: Int4Weight, padding: int) -> Tensor:
    tiles = next(tiles for tiles in (8, 4, 2) if weight.shape[1] % (16 * tiles) == 0)
    return torch.ops.aten._convert_weight_to_int4pack(nn.functional.pad(weight.codes, (0, 0, 0, padding)), tiles)


def _matmul_on_cuda(x: Tensor, packed: Tensor, scale_and_zero: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm(x, packed, GROUP_SIZE, scale_and_zero)


# -- choice --------------------------------------------------------------------------------------------------------------


def fast_weight(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight for its device's fastest operator; itself if none can run."""
    device = next(weight.buffers()).device
    if device.type == "cpu":
        return _fast_cpu_weight(weight)
    if isinstance(weight, Int4Weight) and has_int4_kernel(device):
        return PackedInt4Weight(weight)
    return weight


def _fast_cpu_weight(weight: QuantizedWeight) -> QuantizedWeight:
    has_vnni = vnni_weights.problem() is None
    if isinstance(weight, Int8Weight):
        if has_vnni and weight.shape[1] <= vnni_weights.MAX_INPUTS_INT8:
            return VnniInt8Weight(weight)
        return FbgemmInt8Weight(weight, torch.cpu._is_vnni_supported()) if has_fbgemm() else weight
    if isinstance(weight, Int4Weight):
        return VnniInt4Weight(weight) if has_vnni else PackedInt4Weight(weight)
    return weight


def has_int4_kernel(device: torch.device) -> bool:
    """Whether a GPU can run torch's int4 operator."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


class QuantizedMatmul(SharedMatmul):
    """One quantized matmul for one or several layers.

    Args:
        layers: of the same input width and kind, all with a bias or all without.
    """

    def __init__(self, layers: list[QuantizedLinear]) -> None:
        super().__init__([layer.out_features for layer in layers])
        weights = [layer.quantized for layer in layers]
        self.quantized = fast_weight(weights[0] if len(weights) == 1 else type(weights[0]).cat(weights))
        self.dtype = layers[0].dtype
        self.bias = joined_biases(layer.bias for layer in layers)
        self.hidden_parameters = self.quantized.shape[0] * self.quantized.shape[1]

    def matmul(self, x: Tensor) -> Tensor:
        """See the base class."""
        out = self.quantized.matmul(x)
        return out if self.bias is None else out.add_(self.bias)

    def stored_weight(self) -> Tensor:
        """See the base class."""
        return self.quantized.dequantize().to(self.dtype)


class FusedQuantizedLinear(SharedLinear):
    """One of the layers of a ``QuantizedMatmul``, or a head."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """(..., K) -> (..., N), or token losses if labels are passed; see ``LMHead``."""
        return self.matmul.output(x, self.index) if labels is None else token_losses(self, x, labels)


def use_fast_kernels(model: nn.Module) -> None:
    """Replace all quantized layers in place: those with the same input share a matmul."""
    for module in list(model.modules()):
        for names in groups_of(module):
            layers = [layer for name in names if isinstance(layer := getattr(module, name, None), QuantizedLinear)]
            kinds = {(type(layer.quantized), layer.bias is None) for layer in layers}
            share_matmul(module, names, layers, kinds, QuantizedMatmul, FusedQuantizedLinear)
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedLinear):
                setattr(module, name, FusedQuantizedLinear(QuantizedMatmul([child]), 0))
    _log_slow(model)


def _log_slow(model: nn.Module) -> None:
    """Say which layers dequantize in each call, and which would be faster with a compiler."""
    kinds = {type(module.quantized) for module in model.modules() if isinstance(module, QuantizedMatmul)}
    if vnni_weights.supports_vnni() and (problem := vnni_weights.problem()) and kinds & {FbgemmInt8Weight, PackedInt4Weight}:
        logger.warning("quantize: torch's operators are used, which on this CPU are slower than our own: %s", problem)
    slow = kinds & {Int8Weight, Int4Weight}
    for kind in sorted(kind.__name__ for kind in slow):
        logger.warning(
            "quantize: there is no fast operator for %s on this device: weights are dequantized in each step, which saves"
            " memory but not time", kind.removesuffix("Weight").lower(),
        )  # fmt: skip


def describe(model: nn.Module) -> str:
    """The kinds of quantized layers, such as "int4, head int8"; empty for a model without any."""
    kinds = {module.scheme for module in model.modules() if isinstance(module, QuantizedWeight)}
    return "int4" if "int4" in kinds else "".join(kinds)
