"""Quantized weights: within their error of the plain formula on every path, and small enough for text to stay the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bumblebee.inference.placement.quantized_kernels import FbgemmInt8Weight, PackedInt4Weight, fast_weight, has_fbgemm
from bumblebee.nn.quantized import GROUP_SIZE, Int4Weight, Int8Weight

BITS = {"int8": Int8Weight, "int4": Int4Weight}
X86_ONLY = pytest.mark.skipif(not has_fbgemm(), reason="FBGEMM runs on x86 only")


def random_weight(rows: int = 80, columns: int = 3 * GROUP_SIZE) -> torch.Tensor:
    """With rows of different magnitude, one of zeros and one of equal values."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 1, rows)[:, None]
    weight[3], weight[4] = 0.0, 0.25
    return weight


@pytest.mark.parametrize("scheme", BITS)
def test_each_weight_is_within_half_a_step(scheme):
    weight = random_weight()
    error = (BITS[scheme].of(weight).dequantize() - weight).abs()
    if scheme == "int8":
        assert (error <= weight.abs().amax(1, keepdim=True) / 127 * 0.5001).all()
        return
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    bound = 0.75 * step + groups.abs().amax(-1) * 2**-8  # the fit moves ends, zeros are bf16
    assert (error.unflatten(1, (-1, GROUP_SIZE)).amax(-1) <= bound).all()


def test_int4_fit_is_better_than_minimum_and_maximum():
    groups = random_weight().unflatten(1, (-1, GROUP_SIZE))[8:]
    low, high = groups.aminmax(dim=-1, keepdim=True)
    rounded = ((groups - low) / (high - low) * 15).round() * (high - low) / 15 + low
    fitted = Int4Weight.of(groups.flatten(1)).dequantize().view_as(groups)
    assert (fitted - groups).square().sum() < 0.95 * (rounded - groups).square().sum()


@X86_ONLY
@pytest.mark.parametrize("has_vnni", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_kernel_equals_the_dequantized_matmul(dtype, has_vnni):
    plain = Int8Weight.of(random_weight())
    packed = FbgemmInt8Weight(plain, has_vnni)
    x = torch.randn(2, 3, plain.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0, 1], x[1, 0, 5] = 0, 100  # a row of zeros, and an outlier
    expected = x.float() @ plain.dequantize().T
    norm = x.float().norm(dim=-1, keepdim=True) * plain.dequantize().norm(dim=1)  # of the sum's terms
    bound = norm * (2e-3 if not has_vnni else 1e-4) + expected.abs() * torch.finfo(dtype).eps
    assert ((packed.matmul(x).float() - expected).abs() <= bound).all()
    assert torch.equal(packed.dequantize(), plain.dequantize())
    alone = torch.cat([packed.matmul(row[None]) for row in x.flatten(0, 1)])
    assert torch.equal(alone, packed.matmul(x).flatten(0, 1)), "a row does not depend on the others"


@pytest.mark.parametrize("rows", [80, 35])
def test_int4_kernel_equals_the_dequantized_matmul(rows):
    plain = Int4Weight.of(random_weight(rows))
    packed = PackedInt4Weight(plain)
    x = torch.randn(2, 3, plain.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = x.float() @ plain.dequantize().T
    assert ((packed.matmul(x).float() - expected).abs() <= 0.01 * expected.abs() + 1e-5).all()
    assert torch.equal(packed.dequantize(), plain.dequantize())


@pytest.mark.parametrize("scheme", BITS)
def test_fallback_equals_the_dequantized_matmul(scheme):
    """On devices without an operator, which meta stands for here."""
    plain = BITS[scheme].of(random_weight())
    assert fast_weight(plain.to("meta")) is plain
    plain = BITS[scheme].of(random_weight())
    x = torch.randn(2, plain.shape[1])
    torch.testing.assert_close(plain.matmul(x), nn.functional.linear(x, plain.dequantize()), rtol=1e-4, atol=1e-4)


def test_int4_layout_for_gpus():
    """Meta runs the packing's checks of shapes and dtypes: rows are padded to a multiple of 16, tiles are 2, 4 or 8."""
    for groups, tiles in ((1, 2), (2, 4), (4, 8), (5, 2)):
        packed = PackedInt4Weight(Int4Weight.of(random_weight(35, groups * GROUP_SIZE)).to("meta"))
        assert packed.packed.shape == (48 // 8, groups * GROUP_SIZE // (16 * tiles), 32, tiles // 2)
        assert packed.scale_and_zero.shape == (groups, 48, 2)
