"""Rollouts: completions that the model in training samples for some prompts.

They run through the inference engine on the trained weights themselves: no copy is made. The completions of a prompt share its
blocks of the KV cache. Each has a random generator of its own, seeded by (seed, step, prompt, number in the group), so that a
resumed run samples the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

from bumblebee.inference.generator import Completion, Generator
from bumblebee.inference.request import EngineRequest
from bumblebee.inference.sampling.sampling_params import SamplingParams
from bumblebee.tokenizer.assistant_mask import Message
from bumblebee.tokenizer.chat_template import Tool


class Question(Protocol):
    """A prompt of the data, such as ``datamodules.prompts.PromptSample``, which describes the fields."""

    @property
    def index(self) -> int: ...
    @property
    def ids(self) -> list[int]: ...
    @property
    def question(self) -> str: ...
    @property
    def record(self) -> Mapping[str, object]: ...
    @property
    def place(self) -> str: ...
    @property
    def messages(self) -> Sequence[Message]: ...
    @property
    def tools(self) -> Sequence[Tool] | None: ...


@dataclass
class Rollout:
    """A completion of a prompt.

    Args:
        prompt: index of the prompt in the data.
        tokens: ids that were sampled, with the token that ended the completion.
        log_probs: their log-probabilities when they were sampled.
        text: the completion as text, without special tokens.
        truncated: whether it was cut, such as at the maximum number of tokens.
        rewards: of each reward function.
        reward: their weighted sum.
        inserted: (number of ``tokens`` before them, ids) of what follows a turn that calls tools: their results, and the
            beginning of the next turn.
        turns: the messages after the prompt, as in the OpenAI API; empty without tools.
        tool_errors: calls that failed.
    """

    prompt: int
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    text: str = ""
    truncated: bool = False
    rewards: list[float] = field(default_factory=list)
    reward: float = 0.0
    inserted: list[tuple[int, list[int]]] = field(default_factory=list)
    turns: list[Message] = field(default_factory=list)
    tool_errors: int = 0

    @property
    def sequence(self) -> tuple[list[int], list[int]]:
        """All ids after the prompt, and the positions of ``tokens`` among them."""
        ids, positions, at = list[int](), list[int](), 0
        for end, between in [*self.inserted, (len(self.tokens), [])]:
            positions += range(len(ids), len(ids) + end - at)
            ids += [*self.tokens[at:end], *between]
            at = end
        return ids, positions

    @classmethod
    def of(cls, prompt: int, completion: Completion) -> Rollout:
        """A rollout without rewards."""
        log_probs = [token.logprob or 0.0 for token in completion.tokens]
        return cls(prompt, completion.token_ids, log_probs, completion.text, completion.finish_reason == "length")


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
    if not prompts:
        return []
    requests = [
        EngineRequest(f"{place} {number}", ids, each)
        for place, ((_, ids), group) in enumerate(zip(prompts, params, strict=True))
        for number, each in enumerate(group)
    ]
    completions = iter(generator.complete(requests))
    return [[Rollout.of(index, next(completions)) for _ in group] for (index, _), group in zip(prompts, params, strict=True)]


def flat(groups: Iterable[Sequence[Rollout]]) -> list[Rollout]:
    """The completions of all groups."""
    return [rollout for group in groups for rollout in group]
