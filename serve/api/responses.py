"""Responses in OpenAI's format, complete or streamed, built from engine outputs.

A response builder receives all outputs of all choices. ``add`` returns the chunks for a stream, and ``body`` the complete
response at the end.

Choices made:
- Tokens and log probabilities are written as token_names.py describes.
- A tool call is sent in one chunk, because only a complete one can be told from text.
- With parallel_tool_calls: false, a choice ends with its first tool call.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from bumblebee.inference.request import RequestOutput, SampledToken
from bumblebee.tokenizer.tokenizer import Tokenizer
from bumblebee.tokenizer.tool_call_format import ToolCallFormat
from bumblebee.tokenizer.tool_call_parser import ParsedCall, ToolCallParser
from serve.api.prompt_logprobs import CompletionLogprobs, Logprobs, PromptLogprob, prompt_logprobs
from serve.api.schemas import ChatRequest, CompletionRequest, GenerationRequest
from serve.api.token_names import TokenNames, finite

JSONObject = dict[str, Any]


class ResponseBuilder:
    """The common part of both endpoints' responses.

    Args:
        body: of the request.
        model: name of the model.
        tokenizer: the model's.
        choices: number of choices.

    Attributes:
        finish_reasons: of the choices; None while they run.
        prompt_tokens: number of prompt tokens of each choice.
    """

    prefix, object, chunk_object = "", "", ""

    def __init__(self, body: GenerationRequest, model: str, tokenizer: Tokenizer, choices: int) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model
        self.names = TokenNames(tokenizer)
        self.samples = body.n or 1
        self.include_usage, self.continuous_usage = body.include_usage, body.continuous_usage
        self.finish_reasons: list[str | None] = [None] * choices
        self.prompt_logprobs_count = body.prompt_logprobs
        self.prompt_logprobs: list[list[dict[str, PromptLogprob] | None] | None] = [None] * choices
        self.prompt_tokens, self.cached_tokens, self.new_tokens = [0] * choices, [0] * choices, [0] * choices

    def usage(self) -> JSONObject:
        """Token counts; a prompt counts once for all its samples."""
        prompt, cached = (sum(counts[:: self.samples]) for counts in (self.prompt_tokens, self.cached_tokens))
        new = sum(self.new_tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def last_chunks(self) -> list[JSONObject]:
        """The chunks after all choices: the usage, if requested."""
        return [{**self._head(self.chunk_object), "choices": [], "usage": self.usage()}] if self.include_usage else []

    def _count(self, index: int, output: RequestOutput) -> None:
        self.prompt_tokens[index], self.cached_tokens[index] = output.prompt_tokens, output.cached_tokens
        self.new_tokens[index] += len(output.tokens)
        if output.prompt_logprobs is not None and self.prompt_logprobs_count is not None:
            self.prompt_logprobs[index] = prompt_logprobs(output.prompt_logprobs, self.prompt_logprobs_count, self.names)

    def _head(self, object: str) -> JSONObject:
        return {"id": self.id, "object": object, "created": self.created, "model": self.model}

    def _chunk(self, choice: JSONObject) -> JSONObject:
        chunk = {**self._head(self.chunk_object), "choices": [choice]}
        if self.continuous_usage:
            return {**chunk, "usage": self.usage()}
        return {**chunk, "usage": None} if self.include_usage else chunk

    def _body(self, choices: list[JSONObject]) -> JSONObject:
        return {**self._head(self.object), "choices": choices, "usage": self.usage()}


class ChatResponseBuilder(ResponseBuilder):
    """The response of POST /v1/chat/completions.

    Args:
        body: of the request.
        model: name of the model.
        tokenizer: the model's.
        tool_call_format: how the model writes tool calls.
    """

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, body: ChatRequest, model: str, tokenizer: Tokenizer, tool_call_format: ToolCallFormat | None = None
    ) -> None:
        super().__init__(body, model, tokenizer, body.n or 1)
        names = [tool.function.name for tool in body.callable_tools]
        self._parsers = [
            ToolCallParser(tool_call_format, names) if tool_call_format and names else None for _ in range(self.samples)
        ]
        self._only_one_call = body.parallel_tool_calls is False
        self._texts: list[list[str]] = [[] for _ in range(self.samples)]
        self._calls: list[list[JSONObject]] = [[] for _ in range(self.samples)]
        self._logprobs: list[list[JSONObject]] | None = [[] for _ in range(self.samples)] if body.logprobs else None

    def first_chunks(self) -> list[JSONObject]:
        """The chunks before the first token: the role."""
        return [self._delta(index, {"role": "assistant", "content": ""}) for index in range(self.samples)]

    def add(self, index: int, output: RequestOutput) -> list[JSONObject]:
        """Add an output to a choice. Returns the chunks for a stream.

        A choice may end before its generation does: then its finish reason is set, but not the output's.
        """
        self._count(index, output)
        parts, reason = _parts(self._parsers[index], output), output.finish_reason
        if self._only_one_call and (calls := [position for position, part in enumerate(parts) if isinstance(part, ParsedCall)]):
            parts, reason = parts[: calls[0] + 1], "stop"
        deltas = [self._part_delta(index, part) for part in parts]
        logprobs = self._logprobs_of(index, output.tokens)
        if logprobs and not deltas:
            deltas = [{}]
        chunks = [self._delta(index, delta, logprobs=None if position else logprobs) for position, delta in enumerate(deltas)]
        if reason is not None:
            self.finish_reasons[index] = "tool_calls" if self._calls[index] and reason == "stop" else reason
            chunks.append(self._delta(index, {}, self.finish_reasons[index]))
        return chunks

    def body(self) -> JSONObject:
        """The complete response, after all choices have finished."""
        scored = {} if self.prompt_logprobs_count is None else {"prompt_logprobs": self.prompt_logprobs[0]}
        return self._body([self._choice(index) for index in range(self.samples)]) | scored

    def _part_delta(self, index: int, part: str | ParsedCall) -> JSONObject:
        """The delta for text or a tool call."""
        if isinstance(part, str):
            self._texts[index].append(part)
            return {"content": part}
        call = {
            "id": uuid.uuid4().hex[:9],  # sent back in the next request; Mistral's template requires nine characters
            "type": "function",
            "function": {"name": part.name, "arguments": part.arguments},
        }
        self._calls[index].append(call)
        return {"tool_calls": [{"index": len(self._calls[index]) - 1, **call}]}

    def _delta(
        self, index: int, delta: JSONObject, reason: str | None = None, logprobs: JSONObject | None = None
    ) -> JSONObject:
        return self._chunk({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})

    def _choice(self, index: int) -> JSONObject:
        text, calls = "".join(self._texts[index]), self._calls[index]
        message: JSONObject = {"role": "assistant", "content": None if calls and not text else text, "refusal": None}
        logprobs = None if self._logprobs is None else {"content": self._logprobs[index], "refusal": None}
        message |= {"tool_calls": calls} if calls else {}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reasons[index]}

    def _logprobs_of(self, index: int, tokens: Sequence[SampledToken]) -> JSONObject | None:
        if self._logprobs is None or not tokens:
            return None
        content = [self._token_logprob(token.id, token.logprob, token.top) for token in tokens]
        self._logprobs[index] += content
        return {"content": content, "refusal": None}

    def _token_logprob(self, id: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> JSONObject:
        alternatives = [self._entry(top_id, value) for top_id, value in top]
        return {**self._entry(id, logprob), "top_logprobs": alternatives}

    def _entry(self, id: int, logprob: float | None) -> JSONObject:
        text = self.names.bytes_of(id)
        return {"token": self.names.name(id), "logprob": finite(logprob), "bytes": None if text is None else list(text)}


class CompletionResponseBuilder(ResponseBuilder):
    """The response of POST /v1/completions.

    Args:
        body: of the request.
        model: name of the model.
        tokenizer: the model's.
        echoes: the text of each prompt, if the request asks for it before the completion.
    """

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: CompletionRequest, model: str, tokenizer: Tokenizer, echoes: Sequence[str] | None = None) -> None:
        choices = len(body.prompt) * (body.n or 1)
        super().__init__(body, model, tokenizer, choices)
        prefixes = echoes or [""] * len(body.prompt)
        self._texts = [[prefixes[index // self.samples]] for index in range(choices)]
        self._echoes = bool(echoes)
        self._logprobs: list[CompletionLogprobs] | None = None
        if body.logprobs is not None:
            self._logprobs = [CompletionLogprobs(self.names, body.logprobs) for _ in range(choices)]

    def first_chunks(self) -> list[JSONObject]:
        """The chunks before the first token: the prompts, if requested; with logprobs, they follow when these are known."""
        if self._logprobs is not None:
            return []
        return [self._chunk(self._choice_text(index, texts[0])) for index, texts in enumerate(self._texts) if texts[0]]

    def add(self, index: int, output: RequestOutput) -> list[JSONObject]:
        """Add an output to a choice. Returns the chunks for a stream."""
        self._count(index, output)
        chunks = self._prompt_chunks(index, output)
        self._texts[index].append(output.text)
        self.finish_reasons[index] = output.finish_reason
        logprobs = self._logprobs[index].add(output.tokens) if self._logprobs and output.tokens else None
        if output.text or logprobs or output.finish_reason:
            chunks.append(self._chunk(self._choice_text(index, output.text, logprobs)))
        return chunks

    def body(self) -> JSONObject:
        """The complete response, after all choices have finished."""
        return self._body([self._choice(index) for index in range(len(self._texts))])

    def _choice(self, index: int) -> JSONObject:
        scored = {} if self.prompt_logprobs_count is None else {"prompt_logprobs": self.prompt_logprobs[index]}
        logprobs = self._logprobs[index].whole if self._logprobs else None
        return self._choice_text(index, "".join(self._texts[index]), logprobs) | scored

    def _prompt_chunks(self, index: int, output: RequestOutput) -> list[JSONObject]:
        """The chunk of an echoed prompt with logprobs."""
        if output.prompt_logprobs is None or not (self._logprobs and self._echoes):
            return []
        text = self._texts[index][0]
        return [self._chunk(self._choice_text(index, text, self._logprobs[index].add_prompt(output.prompt_logprobs, text)))]

    def _choice_text(self, index: int, text: str, logprobs: Logprobs | None = None) -> JSONObject:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": self.finish_reasons[index]}


def _parts(parser: ToolCallParser | None, output: RequestOutput) -> list[str | ParsedCall]:
    """The text and the tool calls that are complete."""
    if parser is None:
        return [output.text] if output.text else []
    parts = parser.feed(output.text)
    return parts if output.finish_reason is None else parts + parser.finish()
