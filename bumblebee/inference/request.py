"""What goes into the engine and what comes out: plain data that can be sent between processes. Torch is not imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bumblebee.inference.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "timeout"]


@dataclass
class Request:
    """One prompt to be continued.

    Args:
        id: the caller's name for it; no two requests in the engine have the same.
        prompt: token ids.
        params: how to choose the new tokens.
        deadline: when it ends at the latest, on the clock of ``time.monotonic()``; None for never.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    deadline: float | None = None


@dataclass
class Token:
    """A new token.

    Args:
        id: its id.
        logprob: its log probability, where the request wants it; see ``sampler.py`` for which distribution.
        top: (id, logprob) of the most likely tokens, best first, as many as the request wants.
    """

    id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Output:
    """What one step brought one request.

    Args:
        id: the request's.
        text: what is complete now; joined, the texts of all outputs are the whole, without special tokens and stop strings.
        tokens: new tokens; one that ended the text is the last of them.
        finish_reason: None while it goes on; "stop" at an end-of-text token, a stop id or a stop string; "length" at
            max_new_tokens or the model's last position; "cancelled"; "timeout" at the deadline.
        prompt_tokens: length of the prompt.
        cached_tokens: how many of them were not computed again, since an earlier request began in the same way.
    """

    id: str
    text: str
    tokens: list[Token]
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
