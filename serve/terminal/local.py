"""LocalModel: a partner in this process. Ctrl-C is seen between two pieces, never inside one."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bumblebee.inference.generator import Generator
from bumblebee.inference.params import SamplingParams
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

    def describe(self) -> str:
        """The folder, the model's size and where it is computed."""
        model, generator = self.generator.model, self.generator
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        room = f"{model.config.max_position_embeddings} tokens of context"
        kind = (
            "" if not self.raw else "; raw: each input is continued" + ("" if self.templated else ", there is no chat template")
        )
        return f"{self.place}: {size:.3g} M parameters, {room}, {generator.dtype} on {generator.device}{kind}"

    def reply(self, messages: Sequence[Message], sampling: dict[str, Any]) -> Pieces:
        """See Partner."""
        with interrupts_held_back() as interrupted:
            try:
                prompt = self._ids(messages)
                for text in self.generator.stream(prompt, SamplingParams(**sampling)):
                    yield Piece(text)
                    if interrupted():
                        break
            except ValueError as error:
                raise Refusal(str(error)) from error
        if interrupted():
            raise KeyboardInterrupt

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt, if the model can take it."""
        if self.raw:
            ids = self.generator.encode(messages[-1]["content"])
        else:
            ids = self.generator.tokenizer.chat_template.ids_of(messages, None, True)
        if len(ids) >= (longest := self.generator.model.config.max_position_embeddings):
            fits = f"{len(ids)} tokens, and the model takes {longest}, its answer's included"
            raise ValueError(f"what was said has {fits}: /reset begins a new conversation")
        return ids


@contextmanager
def interrupts_held_back() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C raises nothing; the function that is given tells whether it has been pressed."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
