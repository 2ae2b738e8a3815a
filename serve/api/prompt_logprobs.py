"""Log probabilities in the responses of POST /v1/completions, and those of prompts, which OpenAI's API has only there.

``echo`` with ``logprobs`` puts the prompt's tokens before the new ones, as OpenAI's API did and lm-evaluation-harness expects:
the first token, which nothing precedes, has null. ``prompt_logprobs`` is vLLM's field of both endpoints: a list of one object
for each prompt token, whose keys are token ids.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TypedDict

from bumblebee.inference.request import PromptToken, SampledToken
from serve.api.token_names import TokenNames, finite


class Logprobs(TypedDict):
    """The object ``logprobs`` of a choice: parallel lists over its tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(TypedDict):
    """A token that might stand in a place of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


class CompletionLogprobs:
    """Collects the ``logprobs`` of one choice.

    Args:
        names: of the tokens.
        count: number of most likely tokens for each token of an echoed prompt.

    Attributes:
        whole: of all tokens so far.
    """

    def __init__(self, names: TokenNames, count: int) -> None:
        self._names, self._count = names, count
        self.whole = Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add_prompt(self, tokens: Sequence[PromptToken], text: str) -> Logprobs:
        """Add an echoed prompt; returns its part."""
        begin = len(self.whole["tokens"])
        for token in tokens:
            spelled = self._names.bytes_of(token.id)
            self._append(token.id, token.logprob, token.top[: self._count])
            if spelled is not None:
                self._offset += len(self._decoder.decode(spelled))
            elif text.startswith(name := self._names.name(token.id), self._offset):  # not an added begin-of-text token
                self._offset += len(name)
            self._offset = min(self._offset, len(text))
        self._offset = len(text)
        self._decoder.reset()
        return self._since(begin)

    def add(self, tokens: Sequence[SampledToken]) -> Logprobs:
        """Add new tokens; returns their part."""
        begin = len(self.whole["tokens"])
        for token in tokens:
            self._append(token.id, token.logprob, token.top)
            self._offset += len(self._decoder.decode(self._names.bytes_of(token.id) or b""))
        return self._since(begin)

    def _append(self, id: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> None:
        whole, own = self.whole, None if logprob is None else finite(logprob)
        whole["tokens"].append(self._names.name(id))
        whole["token_logprobs"].append(own)
        likely = {self._names.name(other): finite(value) for other, value in top}
        whole["top_logprobs"].append(None if own is None else likely | {self._names.name(id): own})
        whole["text_offset"].append(self._offset)

    def _since(self, begin: int) -> Logprobs:
        whole = self.whole
        return Logprobs(
            tokens=whole["tokens"][begin:],
            token_logprobs=whole["token_logprobs"][begin:],
            top_logprobs=whole["top_logprobs"][begin:],
            text_offset=whole["text_offset"][begin:],
        )


def prompt_logprobs(tokens: Sequence[PromptToken], count: int, names: TokenNames) -> list[dict[str, PromptLogprob] | None]:
    """vLLM's ``prompt_logprobs``: null for the first token, then the token itself and the ``count`` most likely ones."""

    def entry(id: int, logprob: float | None, rank: int) -> PromptLogprob:
        return PromptLogprob(logprob=finite(logprob), rank=rank, decoded_token=names.name(id))

    places: list[dict[str, PromptLogprob] | None] = []
    for token in tokens:
        likely = {str(id): entry(id, value, rank) for rank, (id, value) in enumerate(token.top[:count], start=1)}
        own = {} if token.logprob is None else {str(token.id): entry(token.id, token.logprob, token.rank)}
        places.append(own | likely if own else None)
    return places
