"""LocalModel: a partner in this process, a model folder in an engine.

The engine lives as long as the chat: what it has computed for the earlier turns is found again, and only the new question is
computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from bumblebee.inference.engine_config import GenerationOptions
from bumblebee.inference.generator import Generator
from bumblebee.inference.request import Request
from serve.terminal.partner import Message, Piece, Pieces, Refusal


class LocalModel:
    """Talks to a generator.

    Args:
        generator: model and tokenizer.
        place: where they come from.
        raw: continue plain text; None where the folder has no chat template.
    """

    def __init__(self, generator: Generator, place: str, raw: bool | None = None) -> None:
        self.generator, self.place = generator, place
        self.templated = bool(generator.tokenizer.settings.get("chat_template"))
        self.raw = not self.templated if raw is None else raw
        self.engine = generator.engine(GenerationOptions(max_running=1))
        self.room = min(generator.model.config.max_position_embeddings, self.engine.pages.total * self.engine.pages.size)
        self._numbers = count()

    def describe(self) -> str:
        """The folder, the model's size and where it is computed."""
        size = self.generator.model.num_parameters() / 1e6
        place = f"{str(self.generator.dtype).removeprefix('torch.')} on {self.generator.device}"
        raw = "; raw: each input is continued" if self.raw else ""
        return f"{self.place}: {size:.3g} M parameters, {place}, room for {self.room} tokens{raw}"

    def reply(self, messages: Sequence[Message], sampling: dict[str, Any]) -> Pieces:
        """See Partner. A step that brings nothing, of a long question, is an empty piece."""
        request = self._submit(messages, sampling)
        new_tokens = 0
        try:
            while self.engine.busy:
                for output in (outputs := self.engine.step()):
                    new_tokens += len(output.tokens)
                    yield Piece(output.text, new_tokens, output.finish_reason)
                if not outputs:
                    yield Piece("")
        finally:
            self.engine.cancel(request.id)
            self.engine.step()  # ends what was cancelled, computes nothing

    def _submit(self, messages: Sequence[Message], sampling: dict[str, Any]) -> Request:
        try:
            request = self._request(messages, sampling)
            self.engine.submit(request)
        except ValueError as error:
            raise Refusal(str(error)) from error
        return request

    def _request(self, messages: Sequence[Message], sampling: dict[str, Any]) -> Request:
        """The request for an answer, of as many tokens as there is room for."""
        ids = self._ids(messages)
        left = self.room - len(ids)
        if left < 1:
            fits = f"{len(ids)} tokens, and there is room for {self.room}, the answer's included"
            raise ValueError(f"what was said has {fits}: /reset begins a new conversation")
        params = replace(self.generator.defaults, **sampling)
        if self.raw:  # a text has no end that the model would know
            return Request(str(next(self._numbers)), ids, replace(params, max_new_tokens=min(params.max_new_tokens, left)))
        most = min(sampling.get("max_new_tokens", left), left)
        params = params.ending_with(self.generator.tokenizer.end_of_turn_ids)
        return Request(str(next(self._numbers)), ids, replace(params, max_new_tokens=most))

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        if self.raw:
            return self.generator.encode(messages[-1]["content"])
        return self.generator.converse(messages)
