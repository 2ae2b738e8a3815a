"""Quantized weights: within their error of the plain formula on every path, and small enough for text to stay the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bumblebee.inference.placement import vnni_weights
from bumblebee.inference.placement.quantized_kernels import (
    FbgemmInt8Weight,
    PackedInt4Weight,
    QuantizedMatmul,
    fast_weight,
    has_fbgemm,
    use_fast_kernels,
)
from bumblebee.inference.placement.vnni_weights import VnniInt4Weight, VnniInt8Weight
from bumblebee.nn.quantized import GROUP_SIZE, Int4Weight, Int8Weight, QuantizedLinear

BITS = {"int8": Int8Weight, "int4": Int4Weight}
X86_ONLY = pytest.mark.skipif(not has_fbgemm(), reason="FBGEMM runs on x86 only")
VNNI_ONLY = pytest.mark.skipif(vnni_weights.problem() is not None, reason=f"not compiled: {vnni_weights.problem()}")


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


@VNNI_ONLY
@pytest.mark.parametrize(("rows", "inputs"), [(80, 96), (35, 64), (32, 4896), (1, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", BITS)
def test_vnni_kernel_equals_the_dequantized_matmul(scheme, dtype, rows, inputs):
    plain = BITS[scheme].of(torch.randn(rows, inputs, generator=torch.Generator().manual_seed(0)))
    packed = {"int8": VnniInt8Weight, "int4": VnniInt4Weight}[scheme](plain)
    assert torch.equal(packed.dequantize(), plain.dequantize())
    for count in (1, 2, 3, 4, 5, 9):  # four rows of activations share a panel
        x = torch.randn(count, inputs, generator=torch.Generator().manual_seed(count)).to(dtype)
        x[-1] *= 1e-3
        expected = x.double() @ plain.dequantize().double().T
        norm = x.double().norm(dim=-1, keepdim=True) * plain.dequantize().double().norm(dim=1)
        bound = norm * 1e-4 + expected.abs() * torch.finfo(dtype).eps
        out = packed.matmul(x)
        assert out.dtype == dtype and ((out.double() - expected).abs() <= bound).all()
        alone = torch.cat([packed.matmul(row[None]) for row in x])
        assert torch.equal(alone, out), "a row does not depend on the others"


@VNNI_ONLY
@pytest.mark.parametrize("inputs", [1, 30, 4097])
def test_vnni_int8_takes_any_number_of_inputs(inputs):
    plain = Int8Weight.of(torch.randn(40, inputs, generator=torch.Generator().manual_seed(0)))
    packed = VnniInt8Weight(plain)
    assert torch.equal(packed.dequantize(), plain.dequantize())
    x = torch.randn(2, 3, inputs, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(packed.matmul(x), x @ plain.dequantize().T, rtol=1e-4, atol=1e-4 * inputs**0.5)


@VNNI_ONLY
def test_vnni_int8_sums_do_not_overflow():
    """The largest sums of the widest row: all codes and all activations at their limit."""
    weight = torch.ones(2, vnni_weights.MAX_INPUTS_INT8)
    weight[1] = -1
    out = VnniInt8Weight(Int8Weight.of(weight)).matmul(torch.ones(1, weight.shape[1]))
    torch.testing.assert_close(out, weight.sum(1)[None])
    wider = Int8Weight.of(torch.ones(1, vnni_weights.MAX_INPUTS_INT8 + 4))
    assert not isinstance(fast_weight(wider), VnniInt8Weight)


@VNNI_ONLY
@pytest.mark.parametrize("scheme", BITS)
def test_vnni_kernel_passes_on_what_is_not_finite(scheme):
    packed = fast_weight(BITS[scheme].of(random_weight()))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(6, packed.shape[1], dtype=dtype)
        x[1, 3], x[4, 0], x[5] = torch.nan, -torch.inf, 0
        out = packed.matmul(x)
        assert out[[1, 4]].isnan().all()
        assert out[[0, 2, 3]].isfinite().all() and (out[5] == 0).all()


@VNNI_ONLY
@pytest.mark.parametrize("scheme", BITS)
def test_vnni_kernel_does_not_depend_on_threads(scheme):
    packed = fast_weight(BITS[scheme].of(random_weight(200)))
    x = torch.randn(7, packed.shape[1])
    threads, outputs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            outputs.append(packed.matmul(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@X86_ONLY
@pytest.mark.parametrize("scheme", BITS)
def test_without_a_compiler_torchs_operators_are_used(scheme, monkeypatch, caplog):
    monkeypatch.setattr(vnni_weights, "supports_vnni", lambda: True)
    monkeypatch.setattr(vnni_weights, "problem", lambda: "the C++ compiler g++ was not found")
    model = nn.Sequential(QuantizedLinear(BITS[scheme].of(random_weight()), None, torch.float32))
    use_fast_kernels(model)
    (matmul,) = (module for module in model.modules() if isinstance(module, QuantizedMatmul))
    assert isinstance(matmul.quantized, FbgemmInt8Weight | PackedInt4Weight)
    (message,) = caplog.messages
    assert "slower" in message and message.endswith("the C++ compiler g++ was not found")


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
