"""Answers in OpenAI's form, whole or as the chunks of a stream, from what the engine gives out.

A reply is fed with all outputs of all its choices; each gives the chunks it is worth, and at the end there is the whole object.

Choices made:
- Of a special token the text is empty. In logprobs, where a token has to have a name, it is its spelling, with null for bytes.
- A token that is no whole character has the name that OpenAI gives it: "bytes:\\xf0\\x9f".
- A probability of zero has the log -9999.0: JSON knows no infinity, and OpenAI's server writes this.
- Calls of tools are sent whole, each in one chunk: only then is it known that they are calls.
"""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Sequence
from itertools import count, repeat
from typing import Any

from bumblebee.inference.request import RequestOutput, SampledToken
from bumblebee.tokenizer.tokenizer import Tokenizer
from serve.schemas import ChatRequest, CompletionRequest, Sampling
from serve.tool_call_format import CallFormat
from serve.tool_call_parser import Call, CallParser

Json = dict[str, Any]
IMPOSSIBLE = -9999.0


class Names:
    """What tokens are called in logprobs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def bytes_of(self, index: int) -> bytes | None:
        """The bytes of its text; None for a special token and for an id without a token."""
        table = self._tokenizer.token_bytes
        return None if index in self._tokenizer.special_ids or index >= len(table) else table[index]

    def of(self, index: int) -> str:
        """Its text, or its spelling."""
        text = self.bytes_of(index)
        if text is None:
            return self._tokenizer.backend.id_to_token(index) or f"token_id:{index}"
        try:
            return text.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


class Reply:
    """What both endpoints' replies have in common.

    Args:
        body: the request's.
        model: what the model is called.
        tokenizer: the model's.
        choices: how many.
    """

    prefix, object, chunk_object = "", "", ""

    def __init__(self, body: Sampling, model: str, tokenizer: Tokenizer, choices: int) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model
        self.names = Names(tokenizer)
        self.samples = body.n or 1
        self.include_usage = body.include_usage
        self.reasons: list[str | None] = [None] * choices
        self.prompt_tokens, self.cached_tokens, self.new_tokens = [0] * choices, [0] * choices, [0] * choices

    def usage(self) -> Json:
        """Tokens of each prompt, counted once for all its samples, and of all answers."""
        prompt, cached = (sum(counts[:: self.samples]) for counts in (self.prompt_tokens, self.cached_tokens))
        new = sum(self.new_tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def end(self) -> list[Json]:
        """The chunks behind the last choice's: the usage, if it is wanted."""
        return [{**self._head(self.chunk_object), "choices": [], "usage": self.usage()}] if self.include_usage else []

    def _count(self, index: int, output: RequestOutput) -> None:
        self.prompt_tokens[index], self.cached_tokens[index] = output.prompt_tokens, output.cached_tokens
        self.new_tokens[index] += len(output.tokens)

    def _head(self, object: str) -> Json:
        return {"id": self.id, "object": object, "created": self.created, "model": self.model}

    def _chunk(self, choice: Json) -> Json:
        usage = {"usage": None} if self.include_usage else {}
        return {**self._head(self.chunk_object), "choices": [choice], **usage}

    def _whole(self, choices: list[Json]) -> Json:
        return {**self._head(self.object), "choices": choices, "usage": self.usage()}


class ChatReply(Reply):
    """The reply of POST /v1/chat/completions.

    Args:
        body: the request's.
        model: what the model is called.
        tokenizer: the model's.
        calls: how the model writes calls of tools.
    """

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, body: ChatRequest, model: str, tokenizer: Tokenizer, calls: CallFormat | None = None) -> None:
        super().__init__(body, model, tokenizer, body.n or 1)
        names = [tool.function.name for tool in body.callable_tools]
        self._parsers = [CallParser(calls, names) if calls and names else None for _ in range(self.samples)]
        self._texts: list[list[str]] = [[] for _ in range(self.samples)]
        self._calls: list[list[Json]] = [[] for _ in range(self.samples)]
        self._logprobs: list[list[Json]] | None = [[] for _ in range(self.samples)] if body.logprobs else None

    def begin(self) -> list[Json]:
        """The chunks before the first token: who speaks."""
        return [self._delta(index, {"role": "assistant", "content": ""}) for index in range(self.samples)]

    def add(self, index: int, output: RequestOutput) -> list[Json]:
        """Take what a step has brought to a choice.

        Returns:
            The chunks for a stream.
        """
        self._count(index, output)
        deltas = [self._said(index, part) for part in _parts(self._parsers[index], output)]
        logprobs = self._logprobs_of(index, output.tokens)
        if logprobs and not deltas:
            deltas = [{}]
        chunks = [self._delta(index, delta, logprobs=None if at else logprobs) for at, delta in enumerate(deltas)]
        if output.finish_reason is not None:
            called = self._calls[index] and output.finish_reason == "stop"
            self.reasons[index] = "tool_calls" if called else output.finish_reason
            chunks.append(self._delta(index, {}, self.reasons[index]))
        return chunks

    def whole(self) -> Json:
        """The object, when every choice has finished."""
        return self._whole([self._choice(index) for index in range(self.samples)])

    def _said(self, index: int, part: str | Call) -> Json:
        """The delta of a piece of text or of a call."""
        if isinstance(part, str):
            self._texts[index].append(part)
            return {"content": part}
        call = {
            "id": uuid.uuid4().hex[:9],  # it comes back in the next request, and Mistral's template wants nine characters
            "type": "function",
            "function": {"name": part.name, "arguments": part.arguments},
        }
        self._calls[index].append(call)
        return {"tool_calls": [{"index": len(self._calls[index]) - 1, **call}]}

    def _delta(self, index: int, delta: Json, reason: str | None = None, logprobs: Json | None = None) -> Json:
        return self._chunk({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})

    def _choice(self, index: int) -> Json:
        text, calls = "".join(self._texts[index]), self._calls[index]
        message: Json = {"role": "assistant", "content": None if calls and not text else text, "refusal": None}
        logprobs = None if self._logprobs is None else {"content": self._logprobs[index], "refusal": None}
        message |= {"tool_calls": calls} if calls else {}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self.reasons[index]}

    def _logprobs_of(self, index: int, tokens: Sequence[SampledToken]) -> Json | None:
        if self._logprobs is None or not tokens:
            return None
        content = [self._named(token.id, token.logprob, token.top) for token in tokens]
        self._logprobs[index] += content
        return {"content": content, "refusal": None}

    def _named(self, id: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> Json:
        alternatives = [self._entry(other, value) for other, value in top]
        return {**self._entry(id, logprob), "top_logprobs": alternatives}

    def _entry(self, id: int, logprob: float | None) -> Json:
        text = self.names.bytes_of(id)
        return {"token": self.names.of(id), "logprob": finite(logprob), "bytes": None if text is None else list(text)}


class CompletionReply(Reply):
    """The reply of POST /v1/completions.

    Args:
        body: the request's.
        model: what the model is called.
        tokenizer: the model's.
        echoes: the text of each prompt, if the request wants it before its continuations.
    """

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: CompletionRequest, model: str, tokenizer: Tokenizer, echoes: Sequence[str] | None = None) -> None:
        choices = len(body.prompt) * (body.n or 1)
        super().__init__(body, model, tokenizer, choices)
        before = echoes or [""] * len(body.prompt)
        self._texts = [[before[index // self.samples]] for index in range(choices)]
        self._logprobs = None if body.logprobs is None else [_no_logprobs() for _ in range(choices)]
        self._offsets = [0] * choices
        self._decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in range(choices)]

    def begin(self) -> list[Json]:
        """The chunks before the first token: the prompts, if they are wanted."""
        return [self._chunk(self._piece(index, texts[0])) for index, texts in enumerate(self._texts) if texts[0]]

    def add(self, index: int, output: RequestOutput) -> list[Json]:
        """Take what a step has brought to a choice.

        Returns:
            The chunks for a stream.
        """
        self._count(index, output)
        self._texts[index].append(output.text)
        self.reasons[index] = output.finish_reason
        logprobs = self._logprobs_of(index, output.tokens)
        if not (output.text or logprobs or output.finish_reason):
            return []
        return [self._chunk(self._piece(index, output.text, logprobs))]

    def whole(self) -> Json:
        """The object, when every choice has finished."""
        logprobs = self._logprobs or repeat(None)
        pieces = zip(count(), self._texts, logprobs)
        return self._whole([self._piece(index, "".join(texts), own) for index, texts, own in pieces])

    def _piece(self, index: int, text: str, logprobs: Json | None = None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": self.reasons[index]}

    def _logprobs_of(self, index: int, tokens: Sequence[SampledToken]) -> Json | None:
        if self._logprobs is None or not tokens:
            return None
        new = _no_logprobs()
        for token in tokens:
            name = self.names.of(token.id)
            new["tokens"].append(name)
            new["token_logprobs"].append(finite(token.logprob))
            top = {self.names.of(other): finite(value) for other, value in [*token.top, (token.id, token.logprob)]}
            new["top_logprobs"].append(top)
            new["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(self._decoders[index].decode(self.names.bytes_of(token.id) or b""))
        for key, values in new.items():
            self._logprobs[index][key] += values
        return new


def finite(logprob: float | None) -> float:
    """A log probability as JSON can say it."""
    assert logprob is not None  # the request wants them
    return max(logprob, IMPOSSIBLE)


def _no_logprobs() -> Json:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _parts(parser: CallParser | None, output: RequestOutput) -> list[str | Call]:
    """The text and the calls that are certain now."""
    if parser is None:
        return [output.text] if output.text else []
    parts = parser.feed(output.text)
    return parts if output.finish_reason is None else parts + parser.finish()
