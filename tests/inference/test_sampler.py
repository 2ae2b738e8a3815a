"""The sampler against a simple reference, row by row and in any batch.

Order: penalties and biases, temperature, top-k, top-p, min-p; the last three act on the tempered distribution.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bumblebee import SamplingParams
from bumblebee.inference.request import SampledToken
from bumblebee.inference.sampling import sampler
from bumblebee.inference.sampling.penalties import Penalties, apply_penalties
from bumblebee.inference.sampling.sampler import SamplerState, sample

# Probabilities as distinct integer weights: exact fractions, so that the reference does not round.
WEIGHTS = st.lists(st.integers(1, 10_000), min_size=1, max_size=20, unique=True)
SHARES = st.fractions(Fraction(1, 1000), 1, max_denominator=1000)


def log(weights: list[int]) -> torch.Tensor:
    return torch.tensor(weights, dtype=torch.float64).log().float()


def state(prompt: tuple[int, ...] = (), seed: int | None = 0, **options) -> SamplerState:
    return SamplerState(prompt, SamplingParams(seed=seed, **options))


def draws(logits: torch.Tensor, number: int = 300, prompt: tuple[int, ...] = (), **options) -> Counter:
    """Tokens drawn by independent requests with seeds 0, 1, ..., so that penalties do not interact."""
    states = [state(prompt, seed, **options) for seed in range(number)]
    return Counter(token.id for token in sample(logits.expand(number, -1), states))


# -- truncation ----------------------------------------------------------------------------------------------------------


def kept_reference(weights: list[int], top_k: int, top_p: Fraction, min_p: Fraction) -> list[int]:
    """Kept tokens, the most likely first; examples where rounding could decide are skipped."""
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
    return [token for token in nucleus if token == order[0] or weights[token] >= least]


class Scripted(SamplerState):
    """A request with a fixed random number."""

    number = 0.0

    def uniform(self) -> float:
        return self.number


def token_at(logits: torch.Tensor, number: float, **options) -> int:
    scripted = Scripted((), SamplingParams(**options))
    scripted.number = number
    return sample(logits[None], [scripted])[0].id


@pytest.mark.parametrize("candidates", [(1,), (1, 2), (256,)], ids=str)
def test_token_is_where_cumulative_probability_passes_the_draw(candidates, monkeypatch):
    """With 1 or 2 candidates, most of the larger vocabularies need a second pass."""
    monkeypatch.setattr(sampler, "CANDIDATES", candidates)

    @settings(max_examples=300)
    @given(WEIGHTS, st.integers(0, 25), SHARES, st.just(Fraction(0)) | SHARES, st.floats(0, 1, exclude_max=True))
    def check(weights, top_k, top_p, min_p, number):
        kept = kept_reference(weights, top_k, top_p, min_p)
        if not top_k and top_p == 1 and not min_p:
            kept.sort()  # nothing is cut off: ordered by id
        total, target, before = sum(weights[token] for token in kept), Fraction(number), 0
        for token in kept:
            assume(before == 0 or abs(Fraction(before, total) - target) > Fraction(1, 10**5))
            if Fraction(before + weights[token], total) > target:
                break
            before += weights[token]
        options = {"top_k": top_k, "top_p": float(top_p), "min_p": float(min_p)}
        assert token_at(log(weights), number, **options) == token

    check()


def kept(logits: torch.Tensor, **options) -> set[int]:
    return set(draws(logits, 200, **options))


def test_truncation_by_hand():
    logits = log([50, 30, 15, 5])
    assert kept(logits, top_k=2) == {0, 1}
    assert kept(logits, top_p=0.79) == {0, 1} and kept(logits, top_p=0.81) == {0, 1, 2}
    assert kept(logits, top_p=0.001) == {0}
    assert kept(logits, min_p=0.29) == {0, 1, 2} and kept(logits, min_p=0.31) == {0, 1}
    assert kept(logits, min_p=1.0) == {0}
    assert kept(logits) == {0, 1, 2, 3}


def test_top_p_acts_on_what_top_k_keeps():
    """The first token holds 50 % of the vocabulary, but 62.5 % of the top two: only then it alone reaches 0.6."""
    assert kept(log([50, 30, 15, 5]), top_k=2, top_p=0.6) == {0}
    assert kept(log([50, 30, 15, 5]), top_p=0.6) == {0, 1}


@pytest.mark.parametrize("vocabulary", [10, 1000, 5000])
def test_ties_keep_the_smallest_ids(vocabulary):
    assert kept(torch.zeros(vocabulary), top_k=3) == {0, 1, 2}
    assert max(kept(torch.zeros(vocabulary), top_p=0.01)) < math.ceil(vocabulary / 100)


@pytest.mark.parametrize(("temperature", "tokens"), [(0.5, {0}), (1.0, {0, 1}), (4.0, {0, 1, 2})])
def test_truncation_acts_on_the_tempered_distribution(temperature, tokens):
    """The first token has 0.69, 0.5 and 0.32; the first two have 0.94, 0.8 and 0.61."""
    top_p = 0.62 if temperature > 1 else 0.65
    assert kept(log([50, 30, 15, 5]), temperature=temperature, top_p=top_p) == tokens


# -- reference for all options at once -----------------------------------------------------------------------------------


def reference(logits: torch.Tensor, prompt: list[int], new: list[int], params: SamplingParams) -> torch.Tensor:
    """Probabilities (V,) of the next token in fp64, by the textbook formulas."""
    x = logits.double()
    for token in set(prompt) | set(new):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token, count in Counter(new).items():
        x[token] -= count * params.frequency_penalty + params.presence_penalty
    for token, bias in params.logit_bias.items():
        x[token] += bias
    if params.temperature == 0:
        return torch.nn.functional.one_hot(x.argmax(), len(x)).double()
    p = (x / params.temperature).softmax(-1)
    ordered, order = p.sort(descending=True, stable=True)
    ordered[params.top_k or len(x) :] = 0
    share = ordered / ordered.sum()
    ordered[(share.cumsum(0) - share >= params.top_p) & (params.top_p < 1)] = 0
    ordered[ordered < params.min_p * ordered[0]] = 0
    return torch.zeros_like(p).scatter(0, order, ordered / ordered.sum())


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 5, 40, 300, 2000]),
    top_p=st.sampled_from([1.0, 0.2, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 1.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.3]),
    logit_bias=st.dictionaries(st.integers(0, 999), st.floats(-100, 100), max_size=4),
    seed=st.integers(0, 2**63 - 1),
)


@settings(max_examples=60)
@given(st.lists(PARAMS, min_size=1, max_size=6), st.integers(0, 1000), st.sampled_from([2.0, 6.0]))
def test_mixed_batch_draws_from_the_reference_distributions(batch, seed, width):
    """Every token has positive probability there, and is the one at the request's random number, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1000, (len(batch), 8), generator=generator).tolist()
    states = [SamplerState(prompt, params) for prompt, params in zip(prompts, batch, strict=True)]
    numbers = [torch.Generator().manual_seed(params.seed) for params in batch]
    new: list[list[int]] = [[] for _ in batch]
    for _ in range(4):
        logits = torch.randn(len(batch), 1000, generator=generator) * width
        before = logits.clone()
        tokens = sample(logits, states)
        assert torch.equal(logits, before), "the caller's logits are not modified"
        for row, (token, params) in enumerate(zip(tokens, batch, strict=True)):
            p = reference(logits[row], prompts[row], new[row], params)
            cut = params.top_k or params.top_p < 1 or params.min_p
            order = p.argsort(descending=True, stable=True) if cut else torch.arange(len(p))
            end = p[order].cumsum(0)[(order == token.id).nonzero().item()].item()
            number = 0.0
            if params.temperature:
                number = torch.rand((), generator=numbers[row], dtype=torch.float64).item()
            assert end - p[token.id].item() - 1e-4 <= number <= end + 1e-4 or params.temperature == 0
            assert p[token.id] > 0 or abs(number - end) < 1e-4
            new[row].append(token.id)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.02, "frequency_penalty": 1.0}], ids=str)
def test_draws_do_not_depend_on_the_batch(temperature, options):
    logits = torch.randn(5, 9, 3000, generator=torch.Generator().manual_seed(0))
    ours = {"temperature": temperature, "logprobs": 2, **options}
    neighbours = [{}, {"temperature": 0.0}, {"top_k": 500, "logprobs": 7}, {"top_p": 0.99}, {"presence_penalty": 2.0}]

    def run(row: int | None) -> list[SampledToken]:
        requests = [state(seed=number, **each) for number, each in enumerate(neighbours)]
        requests = [state((1, 2), seed=7, **ours)] if row is None else requests
        if row is not None:
            requests.insert(row, state((1, 2), seed=7, **ours))
        rows = [8] if row is None else [*range(row), 8, *range(row, len(neighbours))]
        return [sample(step[rows], requests)[row or 0] for step in logits]

    alone = run(None)
    for row in range(len(neighbours) + 1):
        among = run(row)
        assert [token.id for token in among] == [token.id for token in alone]
        assert [dict(token.top) for token in among] == [pytest.approx(dict(token.top)) for token in alone]


def test_draws_differ_without_a_seed():
    logits = torch.zeros(1, 10**6)
    assert len({sample(logits, [state(seed=None)])[0].id for _ in range(5)}) == 5


# -- statistics ----------------------------------------------------------------------------------------------------------


def chi_square(counts: Counter, shares: dict[int, float]) -> float:
    """The chi-square statistic in standard deviations, approximately normal for many tokens."""
    number = sum(counts.values())
    assert set(counts) <= set(shares)
    value = sum((counts[token] - number * share) ** 2 / (number * share) for token, share in shares.items())
    free = len(shares) - 1
    return (value - free) / math.sqrt(2 * free)


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"top_k": 60}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str)
def test_draws_pass_a_chi_square_test(options):
    logits = torch.randn(200, generator=torch.Generator().manual_seed(0))
    shares = {token: p for token, p in enumerate(reference(logits, [], [], SamplingParams(**options)).tolist()) if p}
    request, counts = state(**options), Counter()
    for _ in range(40):  # one request many times in a batch: successive draws of its generator
        counts.update(token.id for token in sample(logits.expand(500, -1), [request] * 500))
    assert abs(chi_square(counts, shares)) < 4


def test_large_flat_vocabulary_is_drawn_uniformly():
    """In fp32 the last of 152,000 cumulative probabilities would be off by several percent."""
    numbers = [0.0, 0.25, 0.5, 0.999, 1 - 2**-53]
    assert [token_at(torch.zeros(151_936), number) for number in numbers] == [0, 37984, 75968, 151784, 151935]


@settings(max_examples=200)
@given(st.lists(st.sampled_from([-math.inf, -100.0, 0.0, 3.0]), min_size=1, max_size=200), st.data())
def test_zero_probability_tokens_are_never_drawn(logits, data):
    assume(max(logits) > -math.inf)
    number = data.draw(st.sampled_from([0.0, 0.5, 1 - 2**-24, 1 - 2**-53]) | st.floats(0, 1, exclude_max=True))
    for options in ({}, {"top_p": 0.9999}, {"temperature": 0.0}):
        assert logits[token_at(torch.tensor(logits), number, **options)] > -math.inf


# -- penalties -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=10),
    st.lists(st.integers(0, 9), max_size=10),
    st.floats(0.125, 8.0),
)
def test_repetition_penalty_formula(logits, seen, penalty):
    seen = [token % len(logits) for token in seen]
    expected = [(x / penalty if x > 0 else x * penalty) if token in seen else x for token, x in enumerate(logits)]
    cut = len(seen) // 2  # in the prompt, generated, or both
    request = Penalties(seen[:cut], SamplingParams(repetition_penalty=penalty))
    for token in seen[cut:]:
        request.add(token)
    assert apply_penalties(torch.tensor([logits]), [request])[0].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("penalty", [5e-324, 1e-44, 1e-38, 1e-30])
@pytest.mark.parametrize("temperature", [1e-6, 1.0, 2.0])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"logit_bias": {0: 100.0}}])
def test_tiny_repetition_penalty_still_samples(penalty, temperature, options):
    chosen = draws(
        torch.tensor([1.0, 3.0, -2.0, 0.0]), 20, (0, 2), repetition_penalty=penalty, temperature=temperature, **options
    )
    assert set(chosen) == {0}, "its logit, divided by almost zero, is by far the largest"


def test_presence_and_frequency_count_generated_tokens_only():
    request = Penalties([0, 1], SamplingParams(presence_penalty=0.5, frequency_penalty=0.25))
    for token in (1, 2, 2, 2):
        request.add(token)
    assert apply_penalties(torch.zeros(1, 4), [request]).tolist() == [[0, -0.75, -1.25, 0]]


def test_penalties_count_over_long_completions():
    request = Penalties([], SamplingParams(frequency_penalty=1.0))
    for token in [*range(1000), *range(500)]:
        request.add(token)
    expected = [[-2.0] * 500 + [-1.0] * 500 + [0.0]]
    assert apply_penalties(torch.zeros(1, 1001), [request]).tolist() == expected


def test_penalties_are_applied_first():
    logits = torch.tensor([3.0, 2.0, 1.0])
    assert set(draws(logits, 50, prompt=(0,), repetition_penalty=2.0, top_k=1)) == {1}
    assert set(draws(logits, 1, prompt=(0,), repetition_penalty=2.0, temperature=0.0)) == {1}


def test_logit_bias_forbids_and_forces_tokens():
    logits = torch.tensor([3.0, 2.0, 1.0])
    assert set(draws(logits, 50, logit_bias={0: -100})) == {1, 2}
    assert set(draws(logits, 50, logit_bias={2: 100.0})) == {2}


# -- temperature ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_k": 2}, {"logit_bias": {1: 100}}])
def test_stop_ids_are_not_sampled_before_min_new_tokens(options):
    logits = torch.tensor([[0.0, 50.0, 1.0, 40.0]]).expand(2, -1)
    early, other = (
        SamplerState((), SamplingParams(seed=0, min_new_tokens=minimum, **options), {1, 3, 99}) for minimum in (2, 0)
    )
    tokens = [[token.id for token in sample(logits, [early, other])] for _ in range(3)]
    assert [token for _, token in tokens] == [1, 1, 1]
    assert {tokens[0][0], tokens[1][0]} <= {0, 2} and tokens[2][0] == 1


def test_min_new_tokens_leaves_a_token_to_sample():
    whole = SamplerState((), SamplingParams(min_new_tokens=2), {0, 1})
    assert sample(torch.zeros(1, 2), [whole])[0].id in (0, 1)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20, unique=True))
def test_temperature_zero_is_argmax_for_any_seed(logits):
    best = max(range(len(logits)), key=logits.__getitem__)
    assert set(draws(torch.tensor(logits), 3, temperature=0.0, top_k=5, top_p=0.5, min_p=0.1)) == {best}


@pytest.mark.parametrize("temperature", [1e-3, 1e-5, 1e-10, 1e-38, 1e-44, 1e-300])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}])
def test_tiny_temperature_is_nearly_argmax(temperature, options):
    assert set(draws(torch.tensor([10.0, -20.0, 30.0, 29.0]), 20, temperature=temperature, **options)) == {2}


def test_bf16_logits_are_sampled_in_fp32():
    logits = torch.randn(512, generator=torch.Generator().manual_seed(0)).bfloat16()
    options = {"number": 500, "temperature": 0.7, "top_p": 0.9}
    assert draws(logits, **options) == draws(logits.float(), **options)


# -- log-probabilities, and invalid logits -------------------------------------------------------------------------------


def test_logprobs_precede_penalties_and_temperature():
    logits = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
    numbers = [None, 0, 3, 1000]
    options = {"temperature": 2.0, "top_k": 3, "logit_bias": {5: 3.0}, "repetition_penalty": 2.0}
    states = [state((1, 2, 3), logprobs=number and min(number, 100), **options) for number in numbers]
    tokens = sample(logits, states)
    expected = logits.log_softmax(-1)
    assert tokens[0].logprob is None and tokens[0].top == []
    for row in (1, 2, 3):
        assert tokens[row].logprob == pytest.approx(expected[row, tokens[row].id].item(), abs=1e-5)
        best = expected[row].topk(min(numbers[row], 100))
        assert [index for index, _ in tokens[row].top] == best.indices.tolist()
        assert [value for _, value in tokens[row].top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_logprobs_are_capped_at_the_vocabulary():
    [token] = sample(torch.zeros(1, 5), [state(logprobs=20)])
    assert sorted(index for index, _ in token.top) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_p": 0.5}])
def test_nan_and_infinite_logits_raise(wrong, options):
    logits = torch.zeros(2, 300)
    logits[1, 17] = wrong
    with pytest.raises(FloatingPointError, match="logits are NaN or infinite"):
        sample(logits, [state(**options), state(**options)])


def test_state_depends_only_on_sampled_tokens():
    """A copy of the parameters gives the same draws: there is no state elsewhere."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(seed=3, frequency_penalty=1.0)
    first, second = SamplerState([1], params), SamplerState([1], replace(params))
    assert [sample(logits, [first])[0].id for _ in range(20)] == [sample(logits, [second])[0].id for _ in range(20)]
