"""How to choose the next tokens of one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

STOPS = 16  # stop strings of one request at most, each of so many characters at most:
STOP_LENGTH = 256
BIASES = 1024
TOP_LOGPROBS = 100
SEEDS = (-(2**63), 2**64 - 1)  # what torch.Generator takes
INFINITY = float("inf")


@dataclass(frozen=True)
class SamplingParams:
    """Options of one request.

    Args:
        max_new_tokens: tokens to add at most.
        temperature: the logits are divided by it; 0 always takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens that together reach this probability (arXiv 1904.09751); 1 keeps all.
        min_p: keep tokens at least this share as likely as the most likely one (arXiv 2407.01082); 0 keeps all.
        repetition_penalty: make tokens that are already there, in the prompt too, less likely (arXiv 1909.05858); 1 changes
            nothing.
        presence_penalty: taken off the logit of every token that was generated before; 0 changes nothing.
        frequency_penalty: taken off a token's logit each time it was generated before; 0 changes nothing.
        logit_bias: added to the logits of these token ids, such as {50: -100}.
        stop: texts that end the answer; it ends before them.
        stop_ids: token ids that end the answer, beside the model's own.
        spelled_ids: special tokens that stand in the text as they are spelled; the others have no text.
        logprobs: tell the log probability of each new token, and of this number of the most likely ones; null tells none.
        seed: of the random choice; null chooses anew each time.
        ignore_eos: go on after the end-of-text token.

    Raises:
        ValueError: a value of the wrong kind or out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: list[str] = field(default_factory=list)
    stop_ids: list[int] = field(default_factory=list)
    spelled_ids: list[int] = field(default_factory=list)
    logprobs: int | None = None
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        texts = f"a list of up to {STOPS} texts of 1 to {STOP_LENGTH} characters"
        biases = f"up to {BIASES} token ids, 0 or more, each with a number between -100 and 100"
        rules = [
            ("max_new_tokens", _whole(self.max_new_tokens, 1), "at least 1"),
            ("temperature", _number(self.temperature, 0), "0 or more"),
            ("top_k", _whole(self.top_k, 0), "0 or more"),
            ("top_p", _number(self.top_p, 0, 1) and self.top_p > 0, "more than 0 and at most 1"),
            ("min_p", _number(self.min_p, 0, 1), "between 0 and 1"),
            ("repetition_penalty", _number(self.repetition_penalty, 0) and self.repetition_penalty > 0, "more than 0"),
            ("presence_penalty", _number(self.presence_penalty, -2, 2), "between -2 and 2"),
            ("frequency_penalty", _number(self.frequency_penalty, -2, 2), "between -2 and 2"),
            ("logit_bias", _biases(self.logit_bias), biases),
            ("stop", _list(self.stop) and len(self.stop) <= STOPS and all(map(_stop, self.stop)), texts),
            ("stop_ids", _ids(self.stop_ids), "a list of token ids, 0 or more"),
            ("spelled_ids", _ids(self.spelled_ids), "a list of token ids, 0 or more"),
            ("logprobs", self.logprobs is None or _whole(self.logprobs, 0, TOP_LOGPROBS), f"between 0 and {TOP_LOGPROBS}"),
            ("seed", self.seed is None or _whole(self.seed, *SEEDS), "a whole number of 64 bits"),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "true or false"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {_shown(getattr(self, name))}")

    def ending_with(self, ids: Sequence[int]) -> SamplingParams:
        """The same for an answer that these ids end as well, such as a chat's end of turn; ``ignore_eos`` ignores them too."""
        return self if self.ignore_eos else replace(self, stop_ids=[*self.stop_ids, *ids])

    def check_ids(self, vocab_size: int) -> None:
        """Whether a model of so many tokens has those that are named here.

        Raises:
            ValueError: it has not.
        """
        for name in ("logit_bias", "stop_ids", "spelled_ids"):
            if wrong := [index for index in getattr(self, name) if index >= vocab_size]:
                raise ValueError(f"{name} names token {wrong[0]}; the model has the tokens 0 to {vocab_size - 1}")


def _whole(value: Any, least: int, most: float = INFINITY) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most


def _number(value: Any, least: float, most: float = INFINITY) -> bool:
    """NaN and the infinities are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and least <= float(value) <= most and float(value) < INFINITY


def _list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _ids(value: Any) -> bool:
    return _list(value) and all(_whole(index, 0) for index in value)


def _stop(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= STOP_LENGTH


def _biases(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) <= BIASES
        and all(_whole(index, 0) and _number(bias, -100, 100) for index, bias in value.items())
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]} ..."
