"""Chat backends: the protocol, and a model folder in this process. ``remote_backend.py`` holds the client of a server.

The engine of a ``LocalBackend`` lives as long as the chat, so the prefix cache already holds the earlier turns and only the
new question is computed.
"""

from __future__ import annotations

from collections.abc import Generator as Iterating
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

from bumblebee.inference.engine_config import EngineConfig
from bumblebee.inference.request import EngineRequest

if TYPE_CHECKING:
    from bumblebee.inference.generator import Generator

Message = dict[str, str]  # OpenAI's: {"role": "user", "content": "..."}
Sampling = dict[str, Any]  # fields of SamplingParams; the backend chooses those that are missing


class ChatError(Exception):
    """An answer failed or broke off; the message is one line for the user. The chat continues."""


@dataclass
class Delta:
    """The next part of an answer.

    Args:
        text: new text, possibly empty.
        new_tokens: tokens of the whole answer so far; None if not known (yet).
        finish_reason: "stop", "length" and so on, with the last delta.
    """

    text: str
    new_tokens: int | None = None
    finish_reason: str | None = None


DeltaStream = Iterating[Delta, None, None]


class ChatBackend(Protocol):
    """Answers conversations."""

    raw: bool  # continues the last message as plain text, without a chat template

    def describe(self) -> str:
        """One line that names the model and where it runs."""
        ...

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> DeltaStream:
        """Stream the answer to a conversation. Closing the generator aborts the request.

        The chat calls this within ``console.defer_interrupt`` and checks for Ctrl-C after each delta.

        Args:
            messages: the conversation; the last message is the user's.
            sampling: fields of SamplingParams; the model's defaults apply to the rest.

        Raises:
            ChatError: the answer failed or broke off.
            KeyboardInterrupt: Ctrl-C during a blocking wait.
        """
        ...


class LocalBackend:
    """Runs a model folder in this process.

    Args:
        generator: model and tokenizer.
        source: the folder they were loaded from.
        raw: continue plain text; None: only if the folder has no chat template.
    """

    def __init__(self, generator: Generator, source: str, raw: bool | None = None) -> None:
        self.generator, self.source = generator, source
        has_template = bool(generator.tokenizer.settings.get("chat_template"))
        self.raw = not has_template if raw is None else raw
        self.engine = generator.engine(EngineConfig(max_running=1))
        cache_tokens = self.engine.cache_tokens
        self.context_length = min(generator.model.config.max_position_embeddings, cache_tokens)
        self._ids = count()

    def describe(self) -> str:
        """The folder, the model's size, dtype, device and context length."""
        size = self.generator.model.num_parameters() / 1e6
        device = f"{self.generator.precision} on {self.generator.device}"
        raw = "; raw: inputs are continued as plain text" if self.raw else ""
        return f"{self.source}: {size:.3g} M parameters, {device}, context of {self.context_length} tokens{raw}"

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> DeltaStream:
        """See ``ChatBackend``. A step that only computes a chunk of a long prompt yields an empty delta."""
        request = self._submit(messages, sampling)
        new_tokens = 0
        try:
            while self.engine.busy:
                for output in (outputs := self.engine.step()):
                    new_tokens += len(output.tokens)
                    yield Delta(output.text, new_tokens, output.finish_reason)
                if not outputs:
                    yield Delta("")
        finally:
            self.engine.cancel(request.id)
            self.engine.step()  # releases the cancelled request's cache; computes nothing

    def _submit(self, messages: Sequence[Message], sampling: Sampling) -> EngineRequest:
        try:
            request = self._request(messages, sampling)
            self.engine.submit(request)
        except ValueError as error:
            raise ChatError(str(error)) from error
        return request

    def _request(self, messages: Sequence[Message], sampling: Sampling) -> EngineRequest:
        """The engine request; ``max_new_tokens`` defaults to the rest of the context in a chat."""
        prompt = self._prompt(messages)
        remaining = self.context_length - len(prompt)
        if remaining < 1:
            limit = f"{len(prompt)} tokens and leaves no room for an answer in a context of {self.context_length} tokens"
            raise ValueError(f"the conversation has {limit}; /reset starts a new conversation")
        params = replace(self.generator.defaults, **sampling)
        if self.raw:  # plain text has no end that the model would recognise
            limited = replace(params, max_new_tokens=min(params.max_new_tokens, remaining))
            return EngineRequest(str(next(self._ids)), prompt, limited)
        max_new_tokens = min(sampling.get("max_new_tokens", remaining), remaining)
        params = params.ending_with(self.generator.tokenizer.end_of_turn_ids)
        return EngineRequest(str(next(self._ids)), prompt, replace(params, max_new_tokens=max_new_tokens))

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        if self.raw:  # special tokens that are spelled in the text are special tokens, as at a server's /v1/completions
            return self.generator.tokenizer.prompt_ids(messages[-1]["content"], parse_special=True)
        return self.generator.encode_chat(messages)
