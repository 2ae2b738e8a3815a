"""OpenAI's client against a running server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from helpers.echo_model import write_echo_model
from helpers.server_process import Running, serving

ANSWER = "Hé **bees** 🐝!"
CALL = '<tool_call>\n{"name": "fly", "arguments": {"to": "花", "at": 3}}\n</tool_call>'
TEXT = f"{ANSWER}\n{CALL}"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "fly",
            "description": "Fly to a flower.",
            "parameters": {"type": "object", "properties": {"to": {"type": "string"}, "at": {"type": "integer"}}},
        },
    }
]
QUESTION = {"role": "user", "content": "Where to?"}
ASK = {"model": "bumblebee", "messages": [QUESTION]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_echo_model(tmp_path_factory.mktemp("echo"), TEXT)


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    with serving(folder, "--api_key", "secret", "--max_running", "1", "--max_queue", "7") as running:
        yield running


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="secret", max_retries=0)


@pytest.fixture
def async_client(running: Running) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="secret", max_retries=0)


def test_models_are_listed_and_retrieved(client):
    assert [model.id for model in client.models.list()] == ["bumblebee"]
    assert client.models.retrieve("bumblebee").object == "model"


def test_chat_completion(client):
    answer = client.chat.completions.create(**ASK, temperature=0)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_chat_has_usage(client):
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    *chunks, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert len(chunks) > 10
    assert (last.choices, last.usage.completion_tokens) == ([], client.chat.completions.create(**ASK).usage.completion_tokens)


def test_repeated_prompt_is_cached(client):
    long = [{"role": "user", "content": "Where to? " * 40}]
    usages = [client.chat.completions.create(model="bumblebee", messages=long).usage for _ in range(2)]
    assert 0 < usages[1].prompt_tokens_details.cached_tokens < usages[1].prompt_tokens


def test_n_stop_and_max_tokens(client):
    answer = client.chat.completions.create(**ASK, n=3, seed=5, stop=["bees", "zz"])
    assert [choice.message.content for choice in answer.choices] == ["Hé **"] * 3
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    short = client.chat.completions.create(**ASK, max_completion_tokens=3)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)


def test_logprob_bytes_join_to_the_text(client):
    answer = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=2)
    tokens = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes or []) for token in tokens).decode() == TEXT
    assert all(len(token.top_logprobs) == 2 and token.logprob > -0.1 for token in tokens)


def test_logit_bias_forces_a_token(client, running):
    token = running.post("/tokenize", {"prompt": "z"}, headers={"Authorization": "Bearer secret"}).json()["tokens"][0]
    answer = client.chat.completions.create(**ASK, logit_bias={str(token): 100}, max_tokens=4, temperature=0)
    assert answer.choices[0].message.content == "zzzz"


def test_tool_call_round_trip(client):
    answer = client.chat.completions.create(**ASK, tools=TOOLS, tool_choice="auto")
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", ANSWER)
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("fly", {"to": "花", "at": 3})
    messages = [QUESTION, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "landed"}]
    answer = client.chat.completions.create(model="bumblebee", messages=messages, tools=TOOLS, tool_choice="none")
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("stop", TEXT)


def test_client_parses_streamed_tool_calls(client):
    with client.chat.completions.stream(**ASK, tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        choice = stream.get_final_completion().choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", ANSWER)
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"to": "花", "at": 3}
    assert "content.delta" in kinds and "tool_calls.function.arguments.done" in kinds


def test_text_completion(client):
    answer = client.completions.create(model="bumblebee", prompt=["Once", "Twice"], max_tokens=200, echo=True)
    assert [choice.text for choice in answer.choices] == ["Once" + TEXT, "Twice" + TEXT]
    assert answer.usage.completion_tokens > 20
    stream = client.completions.create(model="bumblebee", prompt="Once", max_tokens=200, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXT
    listed = client.completions.create(model="bumblebee", prompt="Once", max_tokens=4, logprobs=1).choices[0].logprobs
    assert len(listed.tokens) == len(listed.token_logprobs) == len(listed.text_offset) == 4


@pytest.mark.anyio
async def test_async_client(async_client):
    answer = await async_client.chat.completions.create(**ASK)
    assert answer.choices[0].message.content == TEXT
    stream = await async_client.chat.completions.create(**ASK, stream=True, tools=TOOLS)
    deltas = [chunk.choices[0].delta async for chunk in stream]
    assert "".join(delta.content or "" for delta in deltas) == ANSWER
    assert [call.function.name for delta in deltas for call in delta.tool_calls or []] == ["fly"]


def rejected(kind, create, **changes):
    with pytest.raises(kind) as caught:
        create(**{**ASK, **changes})
    assert caught.value.message.startswith("Error code") and caught.value.type  # the client has parsed OpenAI's error object
    return caught.value


def test_errors_raise_the_clients_exceptions(client):
    create = client.chat.completions.create
    error = rejected(openai.BadRequestError, create, temperature=3)
    assert (error.param, error.code, error.type) == ("temperature", "invalid_value", "invalid_request_error")
    assert "Invalid value for 'temperature': must be at most 2" in str(error)
    assert rejected(openai.BadRequestError, create, extra_body={"tempreature": 1}).code == "unknown_parameter"
    assert rejected(openai.BadRequestError, create, stream=True, n=0).param == "n"
    long = [{"role": "user", "content": "long " * 5000}]
    assert rejected(openai.BadRequestError, create, messages=long).code == "context_length_exceeded"
    assert rejected(openai.NotFoundError, create, model="gpt-4o").code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="bumblebee", input="Hello")


def test_structured_output_is_rejected_by_name(client):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    error = rejected(openai.BadRequestError, client.chat.completions.create, response_format=schema)
    assert (error.param, error.code) == ("response_format", "unsupported_parameter")


def test_wrong_key_is_an_authentication_error(client):
    other_client = client.with_options(api_key="wrong")
    assert rejected(openai.AuthenticationError, other_client.chat.completions.create).code == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        other_client.models.list()


def test_full_queue_is_a_rate_limit_error(client):
    error = rejected(openai.RateLimitError, client.chat.completions.create, n=9)
    assert error.response.headers["retry-after"]
    assert client.chat.completions.create(**ASK).choices[0].message.content == TEXT
