"""Any request body is accepted or rejected with status 400, never an internal error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers.malformed_bodies import CHAT, COMPLETION
from hypothesis import given, settings
from hypothesis import strategies as st

from bumblebee.tokenizer.tokenizer import Tokenizer
from serve.api.errors import APIError
from serve.api.requests import ChoiceRequest, RequestBuilder
from serve.api.responses import ChatResponseBuilder, CompletionResponseBuilder
from serve.api.schemas import ChatRequest, CompletionRequest, parse

words = st.text(max_size=8) | st.sampled_from(["user", "assistant", "tool", "system", "text", "function", "auto", "none", "c1"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 500) | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
functions = st.fixed_dictionaries(
    {"name": words}, optional={"description": values, "parameters": values, "strict": values, "arguments": words | values}
)
calls = st.fixed_dictionaries({"id": words, "type": words, "function": functions | values})
messages = st.fixed_dictionaries(
    {"role": words},
    optional={
        "content": words | st.lists(st.fixed_dictionaries({"type": words, "text": words | values}), max_size=2) | values,
        "name": words,
        "tool_calls": st.lists(calls, max_size=2) | values,
        "tool_call_id": words,
    },
)
shared = {name: values for name in ("stream", "stream_options", "n", "max_tokens", "temperature", "top_p", "stop", "seed")}
shared |= {"logit_bias": st.dictionaries(st.integers(-5, 500).map(str) | words, st.floats(-120, 120), max_size=3) | values}
chats = st.fixed_dictionaries(
    {"model": words},
    optional={
        **shared,
        "messages": st.lists(messages, max_size=3) | values,
        "tools": st.lists(st.fixed_dictionaries({"type": words, "function": functions}), max_size=2) | values,
        "tool_choice": words | values,
        "response_format": values,
        "logprobs": values,
        "top_logprobs": values,
    },
)
ids = st.lists(st.integers(-1, 410), max_size=4)
completions = st.fixed_dictionaries(
    {"model": words},
    optional={
        **shared,
        "prompt": words | ids | st.lists(words | ids, max_size=3) | values,
        "echo": values,
        "logprobs": values,
        "prompt_logprobs": values,
    },
)


@pytest.fixture(scope="module")
def builder(tokenizer_folder):
    return RequestBuilder(Tokenizer.from_pretrained(tokenizer_folder), 256, 400, system_prompt="Be kind.")


def build(builder: RequestBuilder, chat: bool, body: dict[str, Any]) -> list[ChoiceRequest]:
    raw = json.dumps(body).encode()
    if chat:
        request = parse(ChatRequest, raw)
        ChatResponseBuilder(request, "m", builder.tokenizer, builder.tool_call_format).first_chunks()
        return builder.chat(request)
    completion = parse(CompletionRequest, raw)
    echoes = [builder.echo(prompt) for prompt in completion.prompt] if completion.echo else None
    CompletionResponseBuilder(completion, "m", builder.tokenizer, echoes).first_chunks()
    return builder.completion(completion)


@settings(max_examples=300)
@given(chat=st.booleans(), data=st.data())
def test_any_json_body_is_accepted_or_rejected(builder, chat, data):
    changes = data.draw(chats if chat else completions)
    base_fields = data.draw(st.sets(st.sampled_from(sorted(CHAT if chat else COMPLETION))))
    base = CHAT if chat else COMPLETION
    body = {**changes, **{name: base[name] for name in base_fields}}
    try:
        requests = build(builder, chat, body)
    except APIError as error:
        assert error.status == 400 and error.message and json.dumps(error.body(), allow_nan=False).isascii()
    else:
        assert requests and all(choice.prompt and length(choice) <= 256 for choice in requests)


def length(choice: ChoiceRequest) -> int:
    return len(choice.prompt) + (0 if choice.prompt_only else choice.params.max_new_tokens)


@given(st.binary(max_size=40))
def test_any_bytes_are_rejected(raw):
    with pytest.raises(APIError) as caught:
        parse(ChatRequest, raw)
    assert caught.value.status == 400
