"""RemoteModel: a partner behind a server that speaks OpenAI's protocol, reached with OpenAI's own client."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import openai

from serve.terminal import interrupts
from serve.terminal.partner import Message, Piece, Pieces, Refusal

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 600.0  # between two pieces: a busy server lets requests wait
OTHER_NAMES = {"max_new_tokens": "max_tokens"}  # ours -> OpenAI's, where they differ
BEYOND_OPENAI = ("top_k", "min_p", "repetition_penalty", "ignore_eos", "stop_ids")  # the client does not know these
WHAT_TO_DO: dict[int | str, str] = {  # by the error's code, or its status
    401: "say --api_key KEY",
    403: "say another --api_key KEY",
    404: "see --url and --name",
    429: "/retry asks again",
    503: "/retry asks again",
    "context_length_exceeded": "/reset begins a new conversation",
}


class RemoteModel:
    """Talks to a server.

    Args:
        url: where it is; where it has no path, ``/v1`` is meant.
        name: the model's name there.
        api_key: None where the server asks for none.
        raw: continue plain text.
    """

    def __init__(self, url: str, name: str, api_key: str | None = None, raw: bool = False) -> None:
        self.url, self.name, self.raw = url, name, raw
        base = url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"
        timeout = openai.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
        # The client insists on a key. Where there is none it must not send one, so that the server says that one is missing.
        self.headers = {} if api_key else {"Authorization": openai.Omit()}
        # No silent retries: who waits at a terminal wants to know why, at once.
        self.client = openai.OpenAI(base_url=base, api_key=api_key or "none", timeout=timeout, max_retries=0)

    def describe(self) -> str:
        """The server and the model's name there."""
        return f"{self.name} at {self.url}" + ("; raw: each input is continued" if self.raw else "")

    def reply(self, messages: Sequence[Message], sampling: dict[str, Any]) -> Pieces:
        """See Partner."""
        finished = False
        with self._asked(messages, sampling) as chunks:
            for chunk in self._arriving(chunks):
                yield (piece := self._piece(chunk))
                finished = finished or piece.finish_reason is not None
        if not finished:
            raise Refusal(f"{self.url} stopped in the midst of the answer")

    def _asked(self, messages: Sequence[Message], sampling: dict[str, Any]) -> Any:
        """The stream of chunks, or why there is none."""
        try:
            with interrupts.raised():
                return self._ask(messages, sampling)
        except openai.APIStatusError as error:
            raise Refusal(f"{error.status_code}: {told_by(error)}{_advice(error)}") from error
        except openai.APITimeoutError as error:
            raise Refusal(f"{self.url} takes too long to answer") from error
        except openai.APIError as error:
            raise Refusal(f"{self.url} cannot be reached ({told_by(error)}): is the server running?") from error

    def _arriving(self, chunks: Iterator[Any]) -> Iterator[Any]:
        """The chunks. What fails while they are read is the network's matter or the server's, whatever raises it."""
        try:
            while (chunk := self._next(chunks)) is not None:
                yield chunk
        except Exception as error:
            raise Refusal(f"{self.url} broke the answer off: {told_by(error)}") from error

    def _next(self, chunks: Iterator[Any]) -> Any:
        with interrupts.raised():
            return next(chunks, None)

    def _ask(self, messages: Sequence[Message], sampling: dict[str, Any]) -> Any:
        """The stream of chunks."""
        options = {OTHER_NAMES.get(name, name): value for name, value in sampling.items() if name not in BEYOND_OPENAI}
        more = {name: value for name, value in sampling.items() if name in BEYOND_OPENAI}
        shared = {"model": self.name, "stream": True, "stream_options": {"include_usage": True}}
        shared |= {"extra_body": more, "extra_headers": self.headers}
        create: Any = self.client.completions.create if self.raw else self.client.chat.completions.create
        asked = {"prompt": messages[-1]["content"]} if self.raw else {"messages": list(messages)}
        return create(**asked, **shared, **options)

    def _piece(self, chunk: Any) -> Piece:
        """A chunk of either kind; the one with the usage has no choices."""
        choice = chunk.choices[0] if chunk.choices else None
        text = "" if choice is None else (choice.text if self.raw else choice.delta.content) or ""
        used = chunk.usage
        return Piece(text, used and used.completion_tokens, choice.finish_reason if choice else None)


def told_by(error: Exception) -> str:
    """The server's own words, or the system's."""
    body = getattr(error, "body", None)
    if isinstance(body, dict) and body.get("message"):
        return str(body["message"])
    return re.sub(r"^\[Errno -?\d+\] ", "", str(error.__cause__ or error))


def _advice(error: openai.APIStatusError) -> str:
    wait = error.response.headers.get("retry-after")
    later = f", in {wait} s" if wait and error.status_code in (429, 503) else ""
    advice = WHAT_TO_DO.get(error.code or "") or WHAT_TO_DO.get(error.status_code)
    return f" ({advice}{later})" if advice else ""
