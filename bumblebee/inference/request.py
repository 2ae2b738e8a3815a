"""What goes into the engine and what comes out of it: plain data that other processes can be sent. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bumblebee.inference.params import SamplingParams


@dataclass
class Request:
    """A prompt to continue.

    Args:
        id: chosen by whoever asks; no two running requests share one.
        prompt: token ids, at least one.
        params: how to choose the new tokens.
        deadline: when to give up, by ``time.monotonic()``; None for never.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    deadline: float | None = None


@dataclass
class Token:
    """A chosen token.

    Args:
        id: of the token.
        logprob: its log probability, where the request asks for it; see ``sampler.py`` for which distribution.
        top: (id, log probability) of the most likely tokens, the most likely first, as many as the request asks for.
    """

    id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Output:
    """What one step brought one request.

    Args:
        id: of the request.
        text: the text that is complete now and was not before; may be empty.
        tokens: the new ones.
        finish_reason: None while the request goes on.
        prompt_tokens: tokens of the prompt.
        cached_tokens: those of them that an earlier request had computed.
    """

    id: str
    text: str
    tokens: list[Token]
    finish_reason: Literal["stop", "length", "cancelled", "timeout"] | None
    prompt_tokens: int
    cached_tokens: int
