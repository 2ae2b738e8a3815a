"""Rollouts: completions that the model in training samples for some prompts.

They run through the inference engine on the trained weights themselves: no copy is made. The completions of a prompt share its
blocks of the KV cache. Each has a random generator of its own, seeded by (seed, step, prompt, number in the group), so that a
resumed run samples the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from bumblebee.inference.generator import Generator
from bumblebee.inference.request import EngineRequest
from bumblebee.inference.sampling.sampling_params import SamplingParams


@dataclass
class Rollout:
    """A completion of a prompt.

    Args:
        prompt: index of the prompt in the data.
        tokens: ids of the completion, with the token that ended it.
        log_probs: their log-probabilities when they were sampled.
        text: the completion as text, without special tokens.
        truncated: whether it was cut at the maximum number of tokens.
        rewards: of each reward function.
    """

    prompt: int
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    text: str = ""
    truncated: bool = False
    rewards: list[float] = field(default_factory=list)


def rollout_seed(seed: int, step: int, prompt: int, number: int) -> int:
    """A 64-bit seed of one completion, unrelated to that of any other."""
    return int.from_bytes(blake2b(f"{seed} {step} {prompt} {number}".encode(), digest_size=8).digest(), "little")


def sample_groups(
    generator: Generator, prompts: Sequence[tuple[int, list[int]]], params: Sequence[Sequence[SamplingParams]]
) -> list[list[Rollout]]:
    """Sample completions of each prompt, all in one batch.

    Args:
        generator: the model in training, in evaluation mode.
        prompts: (index in the data, token ids).
        params: for each prompt the parameters of each of its completions.

    Returns:
        For each prompt its group.
    """
    groups = [[Rollout(index) for _ in group] for (index, _), group in zip(prompts, params, strict=True)]
    requests = [
        EngineRequest(f"{place} {number}", ids, each)
        for place, ((_, ids), group) in enumerate(zip(prompts, params, strict=True))
        for number, each in enumerate(group)
    ]
    for output in generator.outputs(requests):
        place, number = map(int, output.id.split())
        rollout = groups[place][number]
        rollout.text += output.text
        rollout.tokens += [token.id for token in output.tokens]
        rollout.log_probs += [token.logprob or 0.0 for token in output.tokens]
        rollout.truncated = output.finish_reason == "length"
    return groups


def flat(groups: Iterable[Sequence[Rollout]]) -> list[Rollout]:
    """The completions of all groups."""
    return [rollout for group in groups for rollout in group]
