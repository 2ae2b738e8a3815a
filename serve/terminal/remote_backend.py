"""``RemoteBackend``: a server that speaks OpenAI's protocol, through OpenAI's own client."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import urlsplit

import openai
from openai.types import CompletionChoice

from serve.sampling_fields import REQUEST_NAMES
from serve.terminal.backends import ChatError, Delta, DeltaStream, Message, Sampling
from serve.terminal.console import raise_interrupt

if TYPE_CHECKING:
    from openai.types import Completion
    from openai.types.chat import ChatCompletionChunk

Chunk: TypeAlias = "Completion | ChatCompletionChunk"
ChunkStream: TypeAlias = "openai.Stream[Completion] | openai.Stream[ChatCompletionChunk]"

CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 600.0  # seconds between two chunks: a busy server queues requests
EXTRA_FIELDS = (  # not parameters of OpenAI's client
    "top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens", "stop_token_ids", "include_stop_str_in_output",
)  # fmt: skip
ADVICE: dict[int | str, str] = {  # error code or HTTP status -> what the user can do
    401: "use --api_key KEY",
    403: "use another --api_key KEY",
    404: "check --url and --name",
    429: "/retry sends it again",
    503: "/retry sends it again",
    "context_length_exceeded": "/reset starts a new conversation",
}


class RemoteBackend:
    """Sends conversations to a server.

    Args:
        url: base URL; ``/v1`` is appended if it has no path.
        name: the model's name at the server.
        api_key: None if the server requires none.
        raw: continue plain text.
    """

    def __init__(self, url: str, name: str, api_key: str | None = None, raw: bool = False) -> None:
        self.url, self.name, self.raw = url, name, raw
        base_url = url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"
        timeout = openai.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT)
        # The client insists on a key. Without one, omit the header, so that the server reports a missing key.
        self.headers = {} if api_key else {"Authorization": openai.Omit()}
        # No silent retries: a person at a terminal wants to see the reason at once.
        self.client = openai.OpenAI(base_url=base_url, api_key=api_key or "none", timeout=timeout, max_retries=0)

    def describe(self) -> str:
        """The model's name and the server's URL."""
        return f"{self.name} at {self.url}" + ("; raw: inputs are continued as plain text" if self.raw else "")

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> DeltaStream:
        """See ``ChatBackend``."""
        finished = False
        with self._open(messages, sampling) as chunks:
            for chunk in self._chunks(chunks):
                yield (delta := self._delta(chunk))
                finished = finished or delta.finish_reason is not None
        if not finished:
            raise ChatError(f"{self.url} ended the stream before the answer was complete")

    def _open(self, messages: Sequence[Message], sampling: Sampling) -> ChunkStream:
        """Send the request and return the stream of chunks; translates the client's errors to ``ChatError``."""
        try:
            with raise_interrupt():
                return self._create(messages, sampling)
        except openai.APIStatusError as error:
            raise ChatError(f"{error.status_code}: {error_message(error)}{_advice(error)}") from error
        except openai.APITimeoutError as error:
            raise ChatError(f"{self.url} timed out") from error
        except openai.APIError as error:
            raise ChatError(f"cannot connect to {self.url} ({error_message(error)}): is the server running?") from error

    def _create(self, messages: Sequence[Message], sampling: Sampling) -> ChunkStream:
        fields = {REQUEST_NAMES[name]: value for name, value in sampling.items()}
        options = {name: value for name, value in fields.items() if name not in EXTRA_FIELDS}
        extra = {name: value for name, value in fields.items() if name in EXTRA_FIELDS}
        common = {"model": self.name, "stream": True, "stream_options": {"include_usage": True}}
        common |= {"extra_body": extra, "extra_headers": self.headers}
        create: Callable[..., ChunkStream] = self.client.completions.create if self.raw else self.client.chat.completions.create
        prompt = {"prompt": messages[-1]["content"]} if self.raw else {"messages": list(messages)}
        return create(**prompt, **common, **options)

    def _chunks(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The chunks. Any exception while reading comes from the network or the server, whatever its class."""
        try:
            while (chunk := self._next(chunks)) is not None:
                yield chunk
        except Exception as error:
            raise ChatError(f"{self.url} broke off the answer: {error_message(error)}") from error

    def _next(self, chunks: Iterator[Chunk]) -> Chunk | None:
        with raise_interrupt():
            return next(chunks, None)

    def _delta(self, chunk: Chunk) -> Delta:
        """Convert a chunk of either endpoint; the chunk with the usage has no choices."""
        choice = chunk.choices[0] if chunk.choices else None
        if choice is None:
            text = ""
        else:
            text = (choice.text if isinstance(choice, CompletionChoice) else choice.delta.content) or ""
        usage = chunk.usage
        return Delta(text, usage.completion_tokens if usage else None, choice.finish_reason if choice else None)


def error_message(error: Exception) -> str:
    """The message of the server's error object, else of the operating system's error."""
    body = getattr(error, "body", None)
    if isinstance(body, dict) and body.get("message"):
        return str(body["message"])
    return re.sub(r"^\[Errno -?\d+\] ", "", str(error.__cause__ or error))


def _advice(error: openai.APIStatusError) -> str:
    seconds = error.response.headers.get("retry-after")
    later = f", in {seconds} s" if seconds and error.status_code in (429, 503) else ""
    advice = ADVICE.get(error.code or "") or ADVICE.get(error.status_code)
    return f" ({advice}{later})" if advice else ""
