"""Request schemas: accepted and rejected bodies."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers.malformed_bodies import CHAT, COMPLETION

from serve.api.errors import APIError
from serve.api.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, parse


def chat(**changes):
    return parse(ChatRequest, json.dumps({**CHAT, **changes}).encode())


def completion(**changes):
    return parse(CompletionRequest, json.dumps({**COMPLETION, **changes}).encode())


def test_integer_is_accepted_as_number():
    assert chat(temperature=1, top_p=1).temperature == 1.0


def test_null_means_absent_also_for_unknown_fields():
    nulls = dict.fromkeys(
        ("temperature", "stop", "tools", "audio", "functions", "reasoning_effort", "logit_bias", "unheard_of")
    )
    assert chat(**nulls) == chat()
    assert chat(messages=[{**CHAT["messages"][0], "mood": None}]) == chat()


def test_label_fields_are_accepted():
    chat(user="ada", safety_identifier="x", prompt_cache_key="y", store=False, service_tier="auto", parallel_tool_calls=True)
    chat(modalities=["text"], response_format={"type": "text"})
    completion(user="ada", best_of=1)


CALL = {"id": "c", "type": "function", "function": {"name": "fly", "arguments": "{}"}}
PLAIN = {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("returned", "rendered"),
    [
        ({"refusal": None, "tool_calls": None, "audio": None, "function_call": None, "annotations": []}, PLAIN),
        ({"tool_calls": [], "provider_specific_fields": {"refusal": None}, "parsed": {"a": 1}}, PLAIN),
        ({"annotations": [{"type": "url_citation", "url_citation": {"url": "x"}}]}, PLAIN),
        ({"reasoning_content": "Hm.", "reasoning": None}, {**PLAIN, "reasoning_content": "Hm."}),
        ({"reasoning": "Hm."}, {**PLAIN, "reasoning_content": "Hm."}),
        ({"content": None, "refusal": "No."}, {**PLAIN, "content": "No."}),
        (
            {"tool_calls": [{**CALL, "index": 0, "function": {**CALL["function"], "parsed_arguments": {}}}]},
            {**PLAIN, "tool_calls": [CALL]},
        ),
    ],
)
def test_assistant_message_of_a_client_is_taken_back(returned, rendered):
    assert chat(messages=[*CHAT["messages"], {**PLAIN, **returned}]).messages[1].to_template() == rendered


def test_strict_of_a_tool_is_not_shown_to_the_model():
    (tool,) = chat(tools=[{"type": "function", "function": {"name": "fly", "strict": True, "description": None}}]).tools
    assert tool.to_template() == {"type": "function", "function": {"name": "fly"}}


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].text == "Hello"


def test_stop_and_logit_bias_are_normalized():
    body = chat(stop="end", logit_bias={"42": -3})
    assert (body.stop, body.logit_bias) == (["end"], {42: -3.0})


def test_tool_choice_none_has_no_callable_tools():
    tools = [{"type": "function", "function": {"name": "fly", "parameters": {"type": "object"}}}]
    assert [tool.function.name for tool in chat(tools=tools, tool_choice="auto").callable_tools] == ["fly"]
    assert chat(tools=tools, tool_choice="none").callable_tools == []


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompt_forms(prompt, prompts):
    assert completion(prompt=prompt).prompt == prompts


@pytest.mark.parametrize("body", [{"prompt": "a"}, {"messages": CHAT["messages"], "model": "bumblebee"}])
def test_tokenize_accepts_text_or_chat(body):
    parse(TokenizeRequest, json.dumps(body).encode())


TOOL = {"type": "function", "function": {"name": "fly"}}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "a", "messages": CHAT["messages"]},
        {"prompt": "a", "tools": [TOOL]},
        {"messages": CHAT["messages"], "parse_special": True},
    ],
    ids=["none", "both", "tools", "parse_special"],
)
def test_tokenize_requires_prompt_or_messages(body):
    with pytest.raises(APIError, match="prompt or messages|'tools': only allowed with messages|only allowed with prompt"):
        parse(TokenizeRequest, json.dumps(body).encode())


def test_detokenize_accepts_ids():
    assert parse(DetokenizeRequest, b'{"tokens": [1, 2]}').tokens == [1, 2]


def test_error_has_openai_format():
    error = APIError(429, "The queue is full.", code="queue_full", headers={"Retry-After": "2"})
    assert error.body() == {
        "error": {"message": "The queue is full.", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    }


@pytest.mark.parametrize("body", [ChatRequest, CompletionRequest])
def test_openai_document_names_every_field(body):
    page = (Path(__file__).parents[2] / "docs" / "openai.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`([a-z_]+)", page))
    assert {*body.model_fields, *body.unsupported} <= names
