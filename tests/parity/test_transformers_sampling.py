"""Penalties and truncation match transformers' logits processors, in the same order."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers.generation.logits_process import (  # noqa: E402
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bumblebee import SamplingParams  # noqa: E402
from bumblebee.inference.sampling.sampler import SamplerState, sample  # noqa: E402

VOCABULARY, NUMBERS = 600, 400


def hf(params: SamplingParams) -> LogitsProcessorList:
    """The logits processors that transformers' ``generate`` would use."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(params.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    processors += [TopPLogitsWarper(params.top_p), MinPLogitsWarper(params.min_p)]
    return processors


class FixedNumber(SamplerState):
    """A request with a fixed random number."""

    number = 0.0

    def uniform(self) -> float:
        return self.number


def frequencies(logits: torch.Tensor, prompt: list[int], params: SamplingParams) -> torch.Tensor:
    """Token frequencies over many evenly spaced random numbers."""
    states = [FixedNumber(prompt, params) for _ in range(NUMBERS)]
    for index, state in enumerate(states):
        state.number = (index + 0.5) / NUMBERS
    tokens = torch.tensor([token.id for token in sample(logits.expand(NUMBERS, -1), states)])
    return torch.bincount(tokens, minlength=VOCABULARY) / NUMBERS


@settings(max_examples=40)
@given(
    st.integers(0, 10_000),
    st.sampled_from([1.0, 5.0]),
    st.builds(
        SamplingParams,
        temperature=st.floats(0.2, 3.0),
        top_k=st.sampled_from([0, 1, 7, 50, 400]),
        top_p=st.sampled_from([0.1, 0.5, 0.9, 0.99, 1.0]),
        min_p=st.sampled_from([0.0, 0.01, 0.1, 0.7]),
        repetition_penalty=st.sampled_from([1.0, 1.2, 0.7]),
    ),
)
def test_token_frequencies_match_transformers_probabilities(seed, width, params):
    """FixedNumber spaced numbers hit a token in proportion to its probability, give or take one number at either end."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, VOCABULARY, generator=generator) * width
    prompt = torch.randint(VOCABULARY, (30,), generator=generator).tolist()
    expected = hf(params)(torch.tensor([prompt]), logits).softmax(-1)[0]
    assert (frequencies(logits, prompt, params) - expected).abs().max().item() <= 1.01 / NUMBERS


@pytest.mark.parametrize("penalty", [1.3, 0.6])
def test_greedy_with_repetition_penalty_matches_stepwise(penalty):
    """The penalty applies to prompt and new tokens."""
    params = SamplingParams(temperature=0.0, repetition_penalty=penalty)
    logits = torch.randn(40, 1, 50, generator=torch.Generator().manual_seed(0))
    prompt, new = [3, 3, 7], []
    state, processor = SamplerState(prompt, params), RepetitionPenaltyLogitsProcessor(penalty)
    for step in logits:
        expected = processor(torch.tensor([prompt + new]), step.clone()).argmax(-1).item()
        new.append(sample(step, [state])[0].id)
        assert new[-1] == expected
    assert len(set(new)) > 10
