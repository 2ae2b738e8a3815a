"""int8 and int4 weights for ``vnni_matmul.cpp``, on x86 CPUs that have AVX-512 VNNI, and where there is a C++ compiler.

The source is compiled at first use, in about two seconds, for this instruction set rather than for this CPU. Each product is
one call, which reads the packed weight once, as one stream of bytes.

Shapes: N outputs, K inputs, G = K / 32 groups, P = N / 32 panels. N is padded to a multiple of 32, K of int8 to one of 4.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from bumblebee.nn.quantized import GROUP_SIZE, Int4Weight, Int8Weight, QuantizedWeight, Scheme
from bumblebee.utils.native_library import CompilationError, load_library

PANEL = 32  # rows that are stored together
MAX_INPUTS_INT8 = 2**16  # sums of 255 x 127 fit in 32 bits
_SOURCE = Path(__file__).with_name("vnni_matmul.cpp")
_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-fopenmp")
_CHUNK = 64  # panels
_OFFSET_INT8, _OFFSET_INT4 = 128, 8  # codes are stored unsigned
_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p
_SIGNATURE = (_POINTER, _INT, _INT, _POINTER, _INT, _POINTER, ctypes.c_int)  # x, rows, K, packed, N, out, threads


def supports_vnni() -> bool:
    """Whether the CPU and the operating system are ones that the source is written for."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and torch.cpu._is_vnni_supported()


@cache
def problem() -> str | None:
    """Why the products cannot be computed by ``vnni_matmul.cpp``; None if they can. Compiles it at the first call."""
    if not supports_vnni():
        return "the CPU has no AVX-512 VNNI"
    try:
        _products()
    except CompilationError as error:
        return str(error)
    return None


@cache
def _products() -> dict[tuple[Scheme, torch.dtype], Callable[..., None]]:
    """The functions of the library by scheme and dtype of the activations."""
    library = load_library(_SOURCE, _FLAGS)
    products: dict[tuple[Scheme, torch.dtype], Callable[..., None]] = {}
    for scheme in get_args(Scheme):
        for dtype in (torch.float32, torch.bfloat16):
            function = library[f"matmul_{scheme}_{str(dtype).removeprefix('torch.')}"]
            function.argtypes = _SIGNATURE
            function.restype = None
            products[scheme, dtype] = function
    return products


class VnniWeight(QuantizedWeight):
    """A weight in panels.

    Args:
        shape: (N, K).
        packed: uint8, contiguous, on the CPU.
    """

    def __init__(self, shape: tuple[int, int], packed: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.packed: Tensor
        self.register_buffer("packed", packed)

    def matmul(self, x: Tensor) -> Tensor:
        """See the base class."""
        assert x.is_cpu, "packed for a CPU"
        function = _products().get((self.scheme, x.dtype))
        if function is None:
            return self.matmul(x.float()).to(x.dtype)
        (outputs, inputs), x = self.shape, x.contiguous()
        out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype)
        function(
            x.data_ptr(), x.numel() // inputs, inputs, self.packed.data_ptr(), outputs, out.data_ptr(), torch.get_num_threads()
        )
        return out


def _panels(values: Tensor) -> Iterator[Tensor]:
    """(N, ...) -> chunks (up to 64 panels, 32, ...). Packing a chunk at a time takes little memory."""
    for chunk in values.split(_CHUNK * PANEL):
        missing = -len(chunk) % PANEL
        padded = torch.cat([chunk, chunk.new_zeros(missing, *chunk.shape[1:])]) if missing else chunk
        yield padded.unflatten(0, (-1, PANEL))


class VnniInt8Weight(VnniWeight):
    """An int8 weight in panels of (K / 4, 32, 4) codes and 32 scales in fp32.

    Args:
        weight: on the CPU.
    """

    scheme = "int8"

    def __init__(self, weight: Int8Weight) -> None:
        rows, inputs = weight.shape
        panels, width = -(-rows // PANEL), -(-inputs // 4)
        packed = torch.empty(panels, PANEL * 4 * width + PANEL * 4, dtype=torch.uint8)
        for out, codes, scale in zip(packed.split(_CHUNK), _panels(weight.codes), _panels(weight.scale), strict=True):
            codes = pad(codes, (0, -inputs % 4)).view(torch.uint8) ^ _OFFSET_INT8  # adds it
            out[:, : -4 * PANEL].unflatten(1, (width, PANEL, 4)).copy_(codes.unflatten(2, (width, 4)).transpose(1, 2))
            out[:, -4 * PANEL :] = scale.view(torch.uint8)
        super().__init__(weight.shape, packed)

    def dequantize(self) -> Tensor:
        """See the base class."""
        rows, inputs = self.shape
        scale = self.packed[:, -4 * PANEL :].contiguous().view(torch.float32).flatten()
        codes = self.packed[:, : -4 * PANEL].unflatten(1, (-1, PANEL, 4)).transpose(1, 2).flatten(2).flatten(0, 1)
        return (codes[:rows, :inputs].float() - _OFFSET_INT8) * scale[:rows, None]


class VnniInt4Weight(VnniWeight):
    """An int4 weight in panels of G groups, each of (4, 32, 4) bytes with two codes, 32 scales and 32 zeros in bf16.

    The low half of a byte is the code of an input k, the high half that of k + 4.

    Args:
        weight: on the CPU.
    """

    scheme = "int4"

    def __init__(self, weight: Int4Weight) -> None:
        panels, groups = -(-weight.shape[0] // PANEL), weight.shape[1] // GROUP_SIZE
        packed = torch.empty(panels, groups, PANEL * GROUP_SIZE // 2 + 4 * PANEL, dtype=torch.uint8)
        parts = (_panels(each) for each in (weight.codes, weight.scale, weight.zero))
        for out, codes, scale, zero in zip(packed.split(_CHUNK), *parts, strict=True):
            codes = torch.stack([codes >> 4, codes & 15], dim=-1).view(-1, PANEL, groups, 4, 2, 4)
            codes = (codes[..., 1, :] << 4 | codes[..., 0, :]).permute(0, 2, 3, 1, 4).flatten(2)  # (P, G, 512)
            parameters = (each.transpose(1, 2).contiguous().view(torch.uint8) for each in (scale, zero))
            torch.cat([codes, *parameters], dim=2, out=out)
        super().__init__(weight.shape, packed)

    def dequantize(self) -> Tensor:
        """See the base class."""
        rows = self.shape[0]
        codes, *parameters = self.packed.split([PANEL * GROUP_SIZE // 2, 2 * PANEL, 2 * PANEL], dim=2)
        scale, zero = (each.contiguous().view(torch.bfloat16).float()[..., None, None, None] for each in parameters)
        codes = codes.unflatten(2, (4, PANEL, 4)).permute(0, 1, 3, 2, 4)  # (P, G, 32, 4, 4)
        codes = torch.stack([codes & 15, codes >> 4], dim=4).float() - _OFFSET_INT4  # (P, G, 32, 4, 2, 4)
        return torch.addcmul(zero, codes, scale).flatten(3).transpose(1, 2).flatten(2).flatten(0, 1)[:rows]
