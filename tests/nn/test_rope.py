"""Rotary embeddings rotate pairs by the right angles, in fp32 whatever the model's dtype."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bumblebee import Bumblebee, config
from bumblebee.nn.rope import (
    SCALINGS,
    DynamicRotaryEmbedding,
    RotaryEmbedding,
    apply_rotary,
    apply_rotary_interleaved,
    rotary_frequencies,
)  # fmt: skip

D, THETA = 16, 10_000.0
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@settings(deadline=None)
@given(st.integers(0, 40_000))
def test_cosines_and_sines_are_those_of_position_times_frequency(position):
    cos, sin = RotaryEmbedding(D, THETA)(torch.tensor([[position]]))
    angles = [position * THETA ** (-2 * i / D) for i in range(D // 2)]  # fp64
    bound = 1e-6 + position * 2.0**-22  # what fp32 can hold of an angle this large
    assert cos.shape == sin.shape == (1, 1, 1, D // 2) and cos.dtype == sin.dtype == torch.float32
    assert cos.flatten().tolist() == pytest.approx([math.cos(a) for a in angles], abs=bound)
    assert sin.flatten().tolist() == pytest.approx([math.sin(a) for a in angles], abs=bound)


def test_rotation_equals_multiplication_by_a_complex_number():
    x = torch.randn(2, 5, 3, D, dtype=torch.float64)
    cos, sin = RotaryEmbedding(D, THETA)(torch.arange(5).expand(2, 5))
    rotated = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.complex(cos.double(), sin.double())
    torch.testing.assert_close(apply_rotary(x, cos, sin), torch.cat((rotated.real, rotated.imag), -1), rtol=0, atol=1e-5)


def test_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, D)
    rope = RotaryEmbedding(D, THETA)

    def score(query: int, key: int) -> float:
        return float((apply_rotary(q, *rope(torch.tensor([[query]]))) * apply_rotary(k, *rope(torch.tensor([[key]])))).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(9, 8)) > 1e-2


def test_rotate_keeps_the_dtype():
    cos, sin = RotaryEmbedding(D, THETA)(torch.tensor([[3]]))
    assert apply_rotary(torch.randn(1, 1, 1, D, dtype=torch.bfloat16), cos, sin).dtype == torch.bfloat16


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones():
    plain, scaled = rotary_frequencies(D, THETA), RotaryEmbedding(D, THETA, LLAMA3)._frequencies
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 64 / 4.0, wavelengths > 64 / 1.0
    assert short.any() and long.any() and not (short | long).all(), "the three kinds must all occur"
    torch.testing.assert_close(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8.0)
    for i in (~(short | long)).nonzero().flatten().tolist():  # by Llama's own formula
        smooth = (64 / wavelengths[i].item() - 1.0) / (4.0 - 1.0)
        expected = (1 - smooth) * plain[i].item() / 8.0 + smooth * plain[i].item()
        assert scaled[i].item() == pytest.approx(expected, rel=1e-5)


def test_angles_stay_fp32_after_the_model_becomes_bf16(tiny):
    model = Bumblebee(tiny(rope_theta=1_000_000.0))
    far = torch.tensor([[29_999, 30_000, 30_001]])
    before = model.model.rotary(far)
    after = model.bfloat16().model.rotary(far)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    in_bf16 = (far.bfloat16()[..., None] * rotary_frequencies(8, 1_000_000.0).bfloat16()).cos()
    assert (in_bf16 - before[0][:, :, 0]).abs().max() > 0.5, "far positions would show a bf16 computation"
    assert (after[0][0, 0] != after[0][0, 1]).any(), "in bf16 neighbours at 30000 are one position"


def test_frequencies_are_no_part_of_the_state_dict(tiny):
    assert not [key for key in Bumblebee(tiny()).state_dict() if "rotary" in key]


def test_a_config_knows_the_scalings_that_there_are():
    assert config.ROPE_TYPES.keys() == {*SCALINGS, "dynamic"}


@pytest.mark.parametrize("turn", [apply_rotary, apply_rotary_interleaved])
def test_what_lies_behind_the_rotary_dimensions_is_kept(turn):
    x = torch.randn(2, 5, 3, D)
    cos, sin = RotaryEmbedding(6, THETA)(torch.arange(5).expand(2, 5))
    rotated = turn(x, cos, sin)
    torch.testing.assert_close(rotated[..., 6:], x[..., 6:], rtol=0, atol=0)
    torch.testing.assert_close(rotated[..., :6], turn(x[..., :6].contiguous(), cos, sin), rtol=0, atol=0)
    assert (rotated[:, 1:, :, :6] != x[:, 1:, :, :6]).any()


def test_interleaved_pairs_are_neighbours():
    """Rotating adjacent pairs equals permuting to the half-split layout, rotating and permuting back."""
    x, order = torch.randn(2, 5, 3, D), torch.arange(D).view(-1, 2).T.flatten()
    cos, sin = RotaryEmbedding(D, THETA)(torch.arange(5).expand(2, 5))
    expected = apply_rotary(x[..., order], cos, sin)[..., order.argsort()]
    torch.testing.assert_close(apply_rotary_interleaved(x, cos, sin), expected, rtol=0, atol=0)


def test_dynamic_frequencies_depend_on_this_batch_only():
    rope, plain = DynamicRotaryEmbedding(D, THETA, 2.0, 64), RotaryEmbedding(D, THETA)
    short, long = torch.arange(64)[None], torch.arange(100)[None]
    before = rope(short)
    torch.testing.assert_close(before, plain(short), rtol=0, atol=1e-5)
    assert (rope(long)[0][:, :64] - before[0]).abs().max() > 0.1
    torch.testing.assert_close(rope(short), before, rtol=0, atol=0)
