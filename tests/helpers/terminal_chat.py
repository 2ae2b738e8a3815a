"""Greedy answers, a screen and an input reader for tests of the terminal chat."""

from __future__ import annotations

import signal
from dataclasses import replace

from bumblebee import Generator, SamplingParams
from serve.terminal.console import Screen, StdinReader

GREEDY = ("--temperature", "0", "--max_new_tokens", "12")
PARAMS = SamplingParams(temperature=0, max_new_tokens=12)


def answer(generator: Generator, *contents: str, system: str | None = None) -> str:
    """The model's answer to a conversation of alternating questions and answers."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]
    template = generator.tokenizer.chat_template
    params = replace(PARAMS, stop_ids=[template.end_of_turn_id])
    return generator.generate([template.apply(messages, None, True)], params)[0].text


class InterruptedScreen(Screen):
    """Records the output; raises SIGINT during write number ``at``."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.writes, self.notes = at, [], []

    def write(self, text: str) -> None:
        self.writes.append(text)
        if len(self.writes) == self.at:
            signal.raise_signal(signal.SIGINT)

    def note(self, text: str) -> None:
        self.notes.append(text)


class Typing(StdinReader):
    """A reader that counts as interactive."""

    interactive = True
