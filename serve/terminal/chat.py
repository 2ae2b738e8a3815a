"""The terminal chat: options, session loop, and the choice of backend and input.

Torch, openai and prompt_toolkit are imported only by ``open_chat`` and only if needed, so that ``bumblebee chat --help`` is
fast.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal

from serve.terminal import commands
from serve.terminal.backends import ChatBackend, ChatError, Delta, LocalBackend, Sampling
from serve.terminal.console import InputReader, Screen, StdinReader, defer_interrupt
from serve.terminal.conversation import Conversation

FINISH_NOTES = {  # finish reason -> note after the answer
    "length": "cut off: the token limit is reached; /set max_new_tokens raises it, /reset frees context",
    "timeout": "cut off: the server's time limit is reached",
    "content_filter": "cut off by the server's content filter",
}


@dataclass(frozen=True)
class ChatOptions:
    """Options of `bumblebee chat`, in addition to the sampling options.

    Args:
        model: model folder to run in this process.
        url: server to chat with instead, such as http://127.0.0.1:8000.
        api_key: API key of the server.
        name: name of the model at the server.
        device: auto, cpu, cuda or cuda:N; for a model folder.
        device_map: auto spreads the layers of a model that is too large for one GPU over all GPUs; null uses one device.
        dtype: auto (as stored), float32, bfloat16 or float16; for a model folder.
        quantize: int8 or int4 weights, quantized while loading; null keeps them as stored.
        trust_remote_code: run code that the model folder names or contains.
        system_prompt: system prompt of the conversation.
        enable_history: send the earlier turns with each question; false sends each question alone.
        raw: continue each input as plain text, without a chat template; null does so if the model folder has no template.

    Raises:
        ValueError: neither or both of a model folder and a server, or quantize with a server.
    """

    model: str | None = None
    url: str | None = None
    api_key: str | None = None
    name: str = "bumblebee"
    device: str = "auto"
    device_map: Literal["auto"] | None = None
    dtype: str = "auto"
    quantize: Literal["int8", "int4"] | None = None
    trust_remote_code: bool = False
    system_prompt: str | None = None
    enable_history: bool = True
    raw: bool | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.url is None):
            both = "" if self.model is None else ", not both"
            raise ValueError(f"expected --model FOLDER or --url http://127.0.0.1:8000{both}")
        if self.url is not None and self.quantize is not None:
            raise ValueError(f"quantize: {self.quantize} is for a model folder: start the server with it")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url: expected http://HOST:PORT, got {self.url}")


@dataclass
class Answer:
    """The deltas of an answer, joined, and their arrival times."""

    text: str = ""
    new_tokens: int | None = None
    finish_reason: str | None = None
    times: list[float] = field(default_factory=list)  # of the deltas with text

    def add(self, delta: Delta) -> None:
        """Append a delta."""
        if delta.text:
            self.times.append(time.monotonic())
        self.text += delta.text
        self.new_tokens = self.new_tokens if delta.new_tokens is None else delta.new_tokens
        self.finish_reason = delta.finish_reason or self.finish_reason

    def throughput(self) -> str:
        """The token count, and tokens per second between the first and the last delta, as far as they are known."""
        if self.new_tokens is None:
            return ""
        seconds = self.times[-1] - self.times[0] if len(self.times) > 1 else 0.0
        rate = f", {(self.new_tokens - 1) / seconds:.1f} tokens/s" if seconds else ""
        return f"{self.new_tokens} tokens{rate}"


class Chat:
    """A chat session.

    Args:
        backend: answers.
        conversation: the turns so far.
        sampling: fields of SamplingParams; the backend chooses the rest.
        reader: source of the user's inputs.
        screen: destination of the answers.
    """

    def __init__(
        self, backend: ChatBackend, conversation: Conversation, sampling: Sampling, reader: InputReader, screen: Screen
    ) -> None:
        self.backend, self.conversation, self.sampling = backend, conversation, sampling
        self.reader, self.screen = reader, screen
        self.finished = False
        self.unanswered: str | None = None  # the last question, if it got no answer

    def run(self) -> bool:
        """Process inputs until they end. Returns whether all of them succeeded."""
        if self.reader.interactive:
            self.screen.note(f"{self.backend.describe()}\nAlt-Enter inserts a line, Ctrl-C stops an answer; /help, /quit")
        succeeded = True
        while not self.finished:
            try:
                succeeded = self._process(self.reader.read()) and succeeded
            except EOFError:
                break
            except KeyboardInterrupt:
                if not self.reader.interactive:
                    raise
                self.screen.note("/quit or Ctrl-D exits")
        return succeeded

    def _process(self, text: str) -> bool:
        """Run a command or ask a question. Returns whether it succeeded."""
        if text.startswith("/"):
            return commands.run_command(self, text)
        return not text.strip() or self.ask(text)

    def ask(self, question: str) -> bool:
        """Ask a question and print the answer. A partial answer joins the conversation, a question without any does not.

        Returns:
            Whether the answer arrived without an error.
        """
        answer, error = Answer(), None
        try:
            with (
                defer_interrupt() as interrupted,
                closing(self.backend.stream(self.conversation.messages_with(question), self.sampling)) as deltas,
            ):
                self._print(deltas, answer, interrupted)
        except KeyboardInterrupt:
            if not self.reader.interactive:
                raise
            answer.finish_reason = "stopped by Ctrl-C"
        except ChatError as caught:
            error = str(caught)
        if answer.text:
            self.screen.write("\n")
        self._record(question, answer)
        self._print_notes(answer, error)
        return error is None

    def _print(self, deltas: Iterable[Delta], answer: Answer, interrupted: Callable[[], bool]) -> None:
        """Print the deltas as they arrive.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; the answer keeps the deltas so far.
        """
        for delta in deltas:
            answer.add(delta)
            self.screen.write(delta.text)
            if interrupted():
                raise KeyboardInterrupt

    def _record(self, question: str, answer: Answer) -> None:
        self.unanswered = None if answer.text else question
        if answer.text:
            self.conversation.turns.append((question, answer.text))

    def _print_notes(self, answer: Answer, error: str | None) -> None:
        """Print the error, or the throughput and the finish reason."""
        if error is not None:
            self.screen.error(error)
        elif not answer.text:
            self.screen.note("the answer is empty and was not kept; /retry sends the question again")
        if self.reader.interactive and answer.text:
            notes = (answer.throughput(), FINISH_NOTES.get(answer.finish_reason or "", answer.finish_reason))
            self.screen.note(" · ".join(note for note in notes if note and note != "stop"))


def open_chat(options: ChatOptions, sampling: Sampling) -> Chat:
    """Create a chat with a model folder or a server.

    Raises:
        ValueError: the model folder, device, dtype or an option cannot be used.
    """
    screen, interactive = Screen(), sys.stdin.isatty() and sys.stdout.isatty()
    backend = open_backend(options)
    if backend.raw and options.raw is None:
        screen.note(f"{options.model} has no chat template: inputs are continued as plain text (--raw false uses ChatML)")
    if backend.raw and options.system_prompt is not None:
        raise ValueError("system_prompt: plain-text continuation has no system prompt; use --system_prompt null")
    reader: InputReader = StdinReader()
    if interactive:
        from serve.terminal.line_editor import LineEditor

        completions = {name: command.words for name, command in commands.COMMANDS.items()}
        reader = LineEditor(completions, commands.FILE_COMMANDS)
    return Chat(backend, Conversation(options.system_prompt, options.enable_history), sampling, reader, screen)


def open_backend(options: ChatOptions) -> ChatBackend:
    """Connect to the server, or load the model folder. A server needs no torch, a folder no openai."""
    if options.url is not None:
        from serve.terminal.remote_backend import RemoteBackend

        return RemoteBackend(options.url, options.name, options.api_key, bool(options.raw))
    from bumblebee.inference.generator import Generator

    assert options.model is not None
    generator = Generator.from_pretrained(
        options.model, options.device, options.dtype, options.device_map, options.trust_remote_code, options.quantize
    )
    return LocalBackend(generator, options.model, options.raw)
