"""The sampler keeps the tokens that a reference in plain Python keeps, in the order that is documented.

penalties -> temperature -> top-k -> top-p -> min-p, the last three on the tempered distribution.
"""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bumblebee import SamplingParams
from bumblebee.inference.sampler import penalise, sample, truncate

# Probabilities as whole weights, all different: shares are exact fractions, so that the reference does not round.
WEIGHTS = st.lists(st.integers(1, 10_000), min_size=1, max_size=20, unique=True)


def log(weights: list[int]) -> torch.Tensor:
    return torch.tensor(weights, dtype=torch.float64).log().float()


def kept_by_hand(weights: list[int], top_k: int, top_p: Fraction, min_p: Fraction) -> set[int]:
    """The tokens to choose from; examples where rounding could decide are left out."""
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if top_k:
        order = order[:top_k]
    total, before, nucleus = sum(weights[token] for token in order), 0, []
    for token in order:
        share = Fraction(before, total)
        assume(share == 0 or abs(share - top_p) > Fraction(1, 10**5))
        if share < top_p or not nucleus:
            nucleus.append(token)
        before += weights[token]
    least = min_p * weights[order[0]]
    assume(all(abs(weights[token] - least) > least / 10**5 for token in nucleus[1:]) or not min_p)
    return {token for token in nucleus if token == order[0] or weights[token] >= least}


def kept(logits: torch.Tensor, **options) -> set[int]:
    return set(truncate(logits, SamplingParams(**options)).isfinite().nonzero().flatten().tolist())


SHARES = st.fractions(Fraction(1, 1000), 1, max_denominator=1000)


@settings(deadline=None, max_examples=300)
@given(WEIGHTS, st.integers(0, 25), SHARES, st.just(Fraction(0)) | SHARES)
def test_truncation_keeps_what_the_reference_keeps(weights, top_k, top_p, min_p):
    expected = kept_by_hand(weights, top_k, top_p, min_p)
    logits = log(weights)
    assert kept(logits, top_k=top_k, top_p=float(top_p), min_p=float(min_p)) == expected
    truncated = truncate(logits, SamplingParams(top_k=top_k, top_p=float(top_p), min_p=float(min_p)))
    assert all(truncated[token] == logits[token] for token in expected), "what is kept keeps its logit"


def test_a_few_cases_by_hand():
    logits = log([50, 30, 15, 5])
    assert kept(logits, top_k=2) == {0, 1}
    assert kept(logits, top_p=0.79) == {0, 1} and kept(logits, top_p=0.81) == {0, 1, 2}
    assert kept(logits, top_p=0.001) == {0}
    assert kept(logits, min_p=0.29) == {0, 1, 2} and kept(logits, min_p=0.31) == {0, 1}
    assert kept(logits, min_p=1.0) == {0}
    assert kept(logits) == {0, 1, 2, 3}


def test_top_p_is_taken_of_what_top_k_left():
    """The first two hold 80 % of all and all of themselves: 0.6 is reached by the first alone only after top-k."""
    assert kept(log([50, 30, 15, 5]), top_k=2, top_p=0.6) == {0}
    assert kept(log([50, 30, 15, 5]), top_p=0.6) == {0, 1}


def test_of_equal_logits_exactly_top_k_stay():
    assert len(kept(torch.zeros(10), top_k=3)) == 3


def draws(logits: torch.Tensor, number: int = 2000, seen: tuple[int, ...] = (), **options) -> Counter:
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(**options)
    return Counter(sample(logits, list(seen), params, generator) for _ in range(number))


def test_tokens_are_drawn_by_their_tempered_probabilities():
    weights, temperature = [50, 30, 15, 5], 2.0
    powers = [weight ** (1 / temperature) for weight in weights]
    counts = draws(log(weights), number=4000, temperature=temperature)
    for token, power in enumerate(powers):
        share = power / sum(powers)
        assert abs(counts[token] / 4000 - share) < 5 * math.sqrt(share * (1 - share) / 4000)


@pytest.mark.parametrize(("temperature", "tokens"), [(0.5, {0}), (1.0, {0, 1}), (4.0, {0, 1, 2})])
def test_truncation_sees_the_tempered_distribution(temperature, tokens):
    """The share of the first is 0.69, 0.5 and 0.32; of the first two 0.94, 0.8 and 0.61."""
    assert (
        set(draws(log([50, 30, 15, 5]), number=300, temperature=temperature, top_p=0.62 if temperature > 1 else 0.65)) == tokens
    )


def test_penalties_come_before_everything_else():
    logits = torch.tensor([3.0, 2.0, 1.0])
    assert set(draws(logits, number=50, seen=(0,), repetition_penalty=2.0, top_k=1)) == {1}
    assert set(draws(logits, number=1, seen=(0,), repetition_penalty=2.0, temperature=0.0)) == {1}


@settings(deadline=None)
@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=10),
    st.lists(st.integers(0, 9), max_size=10),
    st.floats(0.125, 8.0),
)
def test_the_penalty_divides_positive_and_multiplies_negative_logits_once(logits, seen, penalty):
    seen = [token % len(logits) for token in seen]
    expected = [(x / penalty if x > 0 else x * penalty) if token in seen else x for token, x in enumerate(logits)]
    given_ = torch.tensor(logits)
    assert penalise(given_, seen, penalty).tolist() == pytest.approx(expected, rel=1e-5)
    assert given_.tolist() == logits, "the logits of the caller stay as they are"


@settings(deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20, unique=True))
def test_temperature_zero_is_argmax_whatever_the_seed(logits):
    best = max(range(len(logits)), key=logits.__getitem__)
    options = SamplingParams(temperature=0.0, top_k=5, top_p=0.5, min_p=0.1)
    assert {sample(torch.tensor(logits), [], options, torch.Generator().manual_seed(seed)) for seed in range(3)} == {best}


@pytest.mark.parametrize("temperature", [1e-3, 1e-5, 1e-10, 1e-38, 1e-44, 1e-300])
def test_a_temperature_next_to_zero_is_nearly_argmax(temperature):
    assert set(draws(torch.tensor([10.0, -20.0, 30.0, 29.0]), number=20, temperature=temperature)) == {2}


def test_the_same_seed_draws_the_same_and_another_differs():
    logits, params = torch.zeros(1000), SamplingParams()

    def ten(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [sample(logits, [], params, generator) for _ in range(10)]

    assert ten(1) == ten(1) != ten(2)


def test_bf16_logits_are_sampled_in_fp32():
    logits = torch.randn(512, generator=torch.Generator().manual_seed(0)).bfloat16()
    options = {"number": 500, "temperature": 0.7, "top_p": 0.9}
    assert draws(logits, **options) == draws(logits.float(), **options)
