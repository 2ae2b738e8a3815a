"""SamplingParams: how to sample the completion of one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real

MAX_STOPS = 16
MAX_STOP_LENGTH = 256  # characters
MAX_BIASES = 1024
MAX_LOGPROBS = 100
SEED_RANGE = (-(2**63), 2**64 - 1)  # what torch.Generator accepts
INFINITY = float("inf")


@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of one request.

    Args:
        max_new_tokens: maximum number of tokens to generate.
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens that together reach this probability (arXiv 1904.09751); 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one (arXiv 2407.01082); 0 keeps all.
        repetition_penalty: above 1, makes tokens of the prompt and the completion less likely (arXiv 1909.05858); 1 has no
            effect.
        presence_penalty: subtracted from the logit of every token that was generated before; 0 has no effect.
        frequency_penalty: subtracted from a token's logit once for each time it was generated; 0 has no effect.
        logit_bias: added to the logits of these token ids, such as {50: -100}.
        stop: strings that end the completion; it ends before them.
        stop_ids: token ids that end the completion, in addition to the model's own.
        spelled_ids: special tokens that appear in the text as they are spelled; the others have no text.
        logprobs: return the log-probability of each new token, and of this number of the most likely ones; null returns none.
        seed: of the random generator; null draws a new one each time.
        ignore_eos: continue after the end-of-text token.
        min_new_tokens: number of tokens before which no stop id, stop string or end-of-text token ends the completion.
        include_stop_str_in_output: the text ends after the stop string instead of before it.

    Raises:
        ValueError: a value of the wrong type or out of range.
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
    min_new_tokens: int = 0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        strings = f"a list of up to {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters"
        biases = f"a mapping of up to {MAX_BIASES} token ids to numbers between -100 and 100"
        rules = [
            ("max_new_tokens", _is_int(self.max_new_tokens, 1), "at least 1"),
            ("temperature", _is_number(self.temperature, 0), "0 or more"),
            ("top_k", _is_int(self.top_k, 0), "0 or more"),
            ("top_p", _is_number(self.top_p, 0, 1) and self.top_p > 0, "more than 0 and at most 1"),
            ("min_p", _is_number(self.min_p, 0, 1), "between 0 and 1"),
            ("repetition_penalty", _is_number(self.repetition_penalty, 0) and self.repetition_penalty > 0, "more than 0"),
            ("presence_penalty", _is_number(self.presence_penalty, -2, 2), "between -2 and 2"),
            ("frequency_penalty", _is_number(self.frequency_penalty, -2, 2), "between -2 and 2"),
            ("logit_bias", _is_bias_map(self.logit_bias), biases),
            ("stop", _is_stop_list(self.stop), strings),
            ("stop_ids", _is_id_list(self.stop_ids), "a list of token ids, 0 or more"),
            ("spelled_ids", _is_id_list(self.spelled_ids), "a list of token ids, 0 or more"),
            ("logprobs", self.logprobs is None or _is_int(self.logprobs, 0, MAX_LOGPROBS), f"between 0 and {MAX_LOGPROBS}"),
            ("seed", self.seed is None or _is_int(self.seed, *SEED_RANGE), "a 64-bit integer"),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "true or false"),
            ("min_new_tokens", _is_int(self.min_new_tokens, 0), "0 or more"),
            ("include_stop_str_in_output", isinstance(self.include_stop_str_in_output, bool), "true or false"),
        ]
        for name, valid, rule in rules:
            if not valid:
                raise ValueError(f"{name} must be {rule}, got {_shortened(getattr(self, name))}")

    def ending_with(self, ids: Sequence[int]) -> SamplingParams:
        """A copy with further stop ids, such as a chat's end-of-turn token; unchanged with ``ignore_eos``."""
        return self if self.ignore_eos else replace(self, stop_ids=[*self.stop_ids, *ids])

    def check_ids(self, vocab_size: int) -> None:
        """Check all token ids against a model's vocabulary.

        Raises:
            ValueError: an id is out of the vocabulary.
        """
        for name in ("logit_bias", "stop_ids", "spelled_ids"):
            if unknown := [token_id for token_id in getattr(self, name) if token_id >= vocab_size]:
                known = f"the model's ids are 0 to {vocab_size - 1}"
                raise ValueError(f"{name}: token id {unknown[0]} is out of the vocabulary; {known}")


def _is_int(value: object, low: int, high: float = INFINITY) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def _is_number(value: object, low: float, high: float = INFINITY) -> bool:
    """Whether a value is a finite number in a range."""
    return isinstance(value, Real) and not isinstance(value, bool) and low <= float(value) <= high and float(value) < INFINITY


def _is_id_list(value: object) -> bool:
    return isinstance(value, list | tuple) and all(_is_int(token_id, 0) for token_id in value)


def _is_stop_list(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) <= MAX_STOPS
        and all(isinstance(stop, str) and 1 <= len(stop) <= MAX_STOP_LENGTH for stop in value)
    )


def _is_bias_map(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) <= MAX_BIASES
        and all(_is_int(token_id, 0) and _is_number(bias, -100, 100) for token_id, bias in value.items())
    )


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]} ..."
