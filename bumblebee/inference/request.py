"""Input and output of the engine: plain data that can be sent between processes, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bumblebee.inference.sampling.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "timeout"]


@dataclass
class EngineRequest:
    """One prompt to continue.

    Args:
        id: chosen by the caller; unique among the requests in the engine.
        prompt: token ids.
        params: how to sample the new tokens.
        deadline: when the request times out, on the clock of ``time.monotonic()``; None for never.
        prompt_logprobs: return the log-probability of each prompt token, and of this number of the most likely ones in its
            place; None returns none. Such a prompt is computed without the prefix cache, which holds no logits.
        prompt_only: end after the prompt, without a new token; the finish reason is "length".
        targets: score these tokens instead of the prompt's own: the last of them comes after the whole prompt, each other one
            a prompt token earlier. Only the logits of these places are computed, and what lies before them is read from the
            prefix cache.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    deadline: float | None = None
    prompt_logprobs: int | None = None
    prompt_only: bool = False
    targets: list[int] | None = None


@dataclass
class SampledToken:
    """A new token.

    Args:
        id: token id.
        logprob: log-probability, if requested; ``sampler.py`` says of which distribution.
        top: (id, logprob) of the most likely tokens, best first, as many as requested.
    """

    id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class PromptToken:
    """A token of the prompt, with its log-probability given the tokens before it.

    Args:
        id: token id.
        logprob: the model's log-probability; None for the first token, which nothing precedes.
        rank: 1 if it is the most likely token in its place, and so on; 0 for the first token.
        top: (id, logprob) of the most likely tokens in its place, best first, as many as requested.
    """

    id: int
    logprob: float | None = None
    rank: int = 0
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class RequestOutput:
    """What one engine step produced for one request.

    Args:
        id: the request's id.
        text: newly completed text. The texts of all outputs, joined, are the completion without special tokens and stop
            strings.
        tokens: new tokens; a token that ended the sequence is the last of them.
        finish_reason: None while the request runs; "stop" at an end-of-text token, a stop id or a stop string; "length" at
            max_new_tokens or the model's last position; "cancelled"; "timeout" at the deadline.
        prompt_tokens: length of the prompt in tokens.
        cached_tokens: prompt tokens taken from the prefix cache.
        prompt_logprobs: all prompt tokens, or the targets, if requested, in the first output after the prompt has been
            computed; else None.
    """

    id: str
    text: str
    tokens: list[SampledToken]
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
    prompt_logprobs: list[PromptToken] | None = None
