"""Malformed request bodies and the expected errors, for tests of the schemas and of the running server."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

CHAT: dict[str, Any] = {"model": "bumblebee", "messages": [{"role": "user", "content": "Hello"}]}
COMPLETION: dict[str, Any] = {"model": "bumblebee", "prompt": "Hello"}


@dataclass(frozen=True)
class Malformed:
    """A body, its path, the expected param, and a part of the message."""

    name: str
    path: str
    body: bytes
    param: str | None
    says: str


def _chat(name: str, param: str | None, says: str, **changes: Any) -> Malformed:
    return Malformed(name, "/v1/chat/completions", json.dumps({**CHAT, **changes}).encode(), param, says)


def _message(name: str, param: str | None, says: str, *messages: Any) -> Malformed:
    return _chat(name, param, says, messages=list(messages))


def _completion(name: str, param: str | None, says: str, **changes: Any) -> Malformed:
    return Malformed(name, "/v1/completions", json.dumps({**COMPLETION, **changes}).encode(), param, says)


def _raw(name: str, body: bytes, says: str) -> Malformed:
    return Malformed(name, "/v1/chat/completions", body, None, says)


def _tool(**function: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "fly", **function}}]


def _calls(arguments: Any) -> list[Any]:
    return [{"id": "call_1", "type": "function", "function": {"name": "fly", "arguments": arguments}}]


def _call(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": _calls(arguments)}


HUGE = 10**400
ANSWER = {"role": "assistant", "content": "Hello"}
USER = {"role": "user", "content": "Hello"}
PADDED = {"include_obfuscation": True}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}

MALFORMED = [
    # The body as a whole.
    _raw("empty", b"", "not valid JSON"),
    _raw("cut off", b'{"model": "bumblebee", "messages"', "not valid JSON"),
    _raw("not an object", b"[1, 2]", "expected an object"),
    _raw("null", b"null", "expected an object"),
    _raw("bad UTF-8", b'{"model": "bumblebee", "messages": [{"role": "user", "content": "\xff\xfe"}]}', "not valid JSON"),
    _raw("half a surrogate pair", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "not valid JSON"),
    _raw("NaN", b'{"temperature": NaN}', "not valid JSON"),
    _raw("infinity", b'{"temperature": -Infinity}', "not valid JSON"),
    _raw("deep nesting", b"[" * 100_000 + b"]" * 100_000, "recursion limit"),
    _raw("deep nesting in a field", b'{"tools": ' + b'{"a": ' * 5_000 + b"1" + b"}" * 5_001, "recursion limit"),
    # Types.
    _chat("a string for a number", "temperature", 'a number, got "1"', temperature="1"),
    _chat("true for a number", "top_p", "a number, got true", top_p=True),
    _chat("true for a whole number", "n", "an integer, got true", n=True),
    _chat("a fraction for a whole number", "max_tokens", "an integer, got 1.5", max_tokens=1.5),
    _chat("a number for a switch", "stream", "true or false, got 1", stream=1),
    _chat("a list for a name", "model", "a string, got", model=["bumblebee"]),
    _chat("no model", "model", "a string, got null", model=None),
    _chat("a number as stop", "stop", "a string or a list of strings", stop=5),
    _chat("a number in stop", "stop[1]", "a string, got 5", stop=["a", 5]),
    _chat("a list of biases", "logit_bias", "an object", logit_bias=[1]),
    _chat("messages as text", "messages", "a list", messages="Hello"),
    # Ranges.
    _chat("too hot", "temperature", "at most 2", temperature=2.5),
    _chat("below zero", "temperature", "at least 0", temperature=-1),
    _chat("more than all", "top_p", "at most 1", top_p=1.01),
    _chat("no answers", "n", "at least 1", n=0),
    _chat("no answers, streamed", "n", "at least 1", n=0, stream=True),
    _chat("too many answers", "n", "at most 128", n=129),
    _chat("no tokens", "max_tokens", "at least 1", max_tokens=0),
    _chat("a huge whole number", "max_tokens", "at most", max_tokens=HUGE),
    _chat("a huge seed", "seed", "at most", seed=2**63),
    _chat("a number that overflows", "presence_penalty", "at most 2", presence_penalty=1e308),
    _chat("an empty stop", "stop[0]", "at least 1 characters", stop=""),
    _chat("too many stops", "stop", "at most 16 items", stop=["a"] * 17),
    _chat("a bias on no id", "logit_bias.the", "not a token id", logit_bias={"the": 1}),
    _chat("a strong bias", "logit_bias[5]", "at most 100", logit_bias={"5": 101}),
    _chat("a bias on an unknown id", "logit_bias", "4000000", logit_bias={"4000000": 1}),
    _chat("many alternatives", "top_logprobs", "at most 20", logprobs=True, top_logprobs=21),
    _chat("alternatives of nothing", "top_logprobs", "logprobs: true", top_logprobs=2),
    _chat("a penalty of zero", "repetition_penalty", "greater than 0", repetition_penalty=0),
    # Messages.
    _message("no messages", "messages", "at least 1 items"),
    _message("more messages than OpenAI takes", "messages", "at most 2048 items", *[USER] * 2049),
    _message("a message that is a number", "messages[0]", "an object", 5),
    _message("no role", "messages[0].role", "Missing required parameter", {"content": "Hello"}),
    _message("an unknown role", "messages[1].role", "'tool', got \"robot\"", USER, {"role": "robot", "content": "Hello"}),
    _message("no content", "messages[0].content", "a string or a list", {"role": "user"}),
    _message("a number as content", "messages[0].content", "a string or a list", {"role": "user", "content": 5}),
    _message("an image", "messages[0].content[0].image_url", "only text input", {"role": "user", "content": [IMAGE]}),
    _message("a result without its call", "messages[0].tool_call_id", "required in tool", {"role": "tool", "content": "2"}),
    _message(
        "a result of another call",
        "messages[2].tool_call_id",
        "no earlier tool call",
        USER,
        _call("{}"),
        {"role": "tool", "content": "2", "tool_call_id": "call_2"},
    ),
    _message("a user's calls", "messages[0].tool_calls", "only allowed in assistant", USER | {"tool_calls": _calls("{}")}),
    _message("a user's reasoning", "messages[0].reasoning", "only allowed in assistant", USER | {"reasoning": "Hm."}),
    _message("no calls and no content", "messages[0].content", "a string or", {"role": "assistant", "tool_calls": []}),
    _message("an answer to be heard again", "messages[0].audio", "only text input", ANSWER | {"audio": {"id": "a"}}),
    _message("arguments as object", "messages[0].tool_calls[0].function.arguments", "a string", _call({})),
    _message("invalid JSON arguments", "messages[0].tool_calls[0].function.arguments", "a JSON object encoded", _call("{")),
    _message("deep arguments", "messages[0].tool_calls[0].function.arguments", "a JSON object encoded", _call("[" * 50_000)),
    # Unknown and unsupported fields.
    _chat("a misspelled field", "tempreature", "did you mean 'temperature'?", tempreature=1),
    _chat("an unknown field", "beam_width", "Unknown parameter", beam_width=4),
    _chat("an unknown field within", "stream_options.usage", "Unknown parameter", stream=True, stream_options={"usage": True}),
    _chat("stream options without a stream", "stream_options", "stream: true", stream_options={"include_usage": True}),
    _chat("audio", "audio", "only text output is supported", audio={"voice": "ash", "format": "mp3"}),
    _chat("an answer to be heard", "modalities[0]", "must be 'text'", modalities=["audio"]),
    _chat("functions", "functions", "replaced by tools", functions=[{"name": "fly"}]),
    _chat("JSON mode", "response_format", '{"type": "text"}', response_format={"type": "json_object"}),
    _chat("a call on demand", "tool_choice", "'auto' or 'none'", tools=_tool(), tool_choice="required"),
    _chat("a number of calls", "parallel_tool_calls", "true or false, got 1", parallel_tool_calls=1),
    _chat("a strictness", "tools[0].function.strict", "true or false", tools=_tool(strict="yes")),
    _chat("a top-k of less than all", "top_k", "at least -1", top_k=-2),
    _chat("more tokens than the limit", "min_tokens", "at most max_tokens, 4, got 5", min_tokens=5, max_tokens=4),
    _chat("an unknown stop token", "stop_token_ids", "4000000", stop_token_ids=[4_000_000]),
    _chat("too many stop tokens", "stop_token_ids", "at most 128 items", stop_token_ids=[1] * 129),
    _chat("padded chunks", "stream_options.include_obfuscation", "must be false", stream=True, stream_options=PADDED),
    _chat("a tool's odd name", "tools[0].function.name", "must match", tools=_tool(name="fly away")),
    _chat("two tools of one name", "tools", "duplicate function name 'fly'", tools=_tool() * 2),
    _chat("effort", "reasoning_effort", "Unsupported parameter", reasoning_effort="high"),
    _chat("storing", "store", "must be false", store=True),
    _chat("both names of a limit", "max_tokens", "only one of them", max_tokens=4, max_completion_tokens=5),
    # Completions.
    _completion("no prompt", "prompt", "must be a string, a list", prompt=None),
    _completion("an empty prompt", "prompt", "empty", prompt=""),
    _completion("no prompts", "prompt", "must be a string, a list", prompt=[]),
    _completion("a mixed prompt", "prompt", "must be a string, a list", prompt=["a", 5]),
    _completion("a fraction among ids", "prompt", "must be a string, a list", prompt=[1, 2.5]),
    _completion("an id below zero", "prompt", "-1", prompt=[5, -1]),
    _completion("an unknown id", "prompt", "4000000", prompt=[[5], [4_000_000]]),
    _completion("a huge id", "prompt", "token id", prompt=[HUGE]),
    _completion("too many texts", "n", "128", prompt=["a"] * 100, n=2),
    _completion("a suffix", "suffix", "not supported", suffix="!"),
    _completion("the best of", "best_of", "must be 1", best_of=3),
    _completion("prompt logprobs in a stream", "prompt_logprobs", "not available in a stream", prompt_logprobs=2, stream=True),
    _completion("too many prompt logprobs", "prompt_logprobs", "at most 20", prompt_logprobs=21),
    _completion("fewer than no tokens", "max_tokens", "at least 0", max_tokens=-1),
    _completion("many alternatives of a completion", "logprobs", "at most 5", logprobs=6),
    _completion("a chat's field", "messages", "Unknown parameter", messages=[USER]),
]  # fmt: skip
