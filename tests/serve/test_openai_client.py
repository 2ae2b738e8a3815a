"""OpenAI's own client, and the server as it runs: what is written for one works with the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from helpers.echo_model import parrot
from helpers.server_process import Running, serving

SAID = "Hé **bees** 🐝!"
CALL = '<tool_call>\n{"name": "fly", "arguments": {"to": "花", "at": 3}}\n</tool_call>'
TEXT = f"{SAID}\n{CALL}"
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
    return parrot(tmp_path_factory.mktemp("parrot"), TEXT)


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


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == ["bumblebee"]
    assert client.models.retrieve("bumblebee").object == "model"


def test_a_chat_is_answered(client):
    answer = client.chat.completions.create(**ASK, temperature=0)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_chat_is_streamed_with_its_usage(client):
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    *chunks, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert len(chunks) > 10
    assert (last.choices, last.usage.completion_tokens) == ([], client.chat.completions.create(**ASK).usage.completion_tokens)


def test_an_earlier_prompt_is_not_computed_again(client):
    long = [{"role": "user", "content": "Where to? " * 40}]
    usages = [client.chat.completions.create(model="bumblebee", messages=long).usage for _ in range(2)]
    assert 0 < usages[1].prompt_tokens_details.cached_tokens < usages[1].prompt_tokens


def test_several_answers_stop_strings_and_lengths(client):
    answer = client.chat.completions.create(**ASK, n=3, seed=5, stop=["bees", "zz"])
    assert [choice.message.content for choice in answer.choices] == ["Hé **"] * 3
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    short = client.chat.completions.create(**ASK, max_completion_tokens=3)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)


def test_logprobs_have_the_bytes_of_the_text(client):
    answer = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=2)
    tokens = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes or []) for token in tokens).decode() == TEXT
    assert all(len(token.top_logprobs) == 2 and token.logprob > -0.1 for token in tokens)


def test_a_bias_forces_a_token(client, running):
    token = running.post("/tokenize", {"prompt": "z"}, headers={"Authorization": "Bearer secret"}).json()["tokens"][0]
    answer = client.chat.completions.create(**ASK, logit_bias={str(token): 100}, max_tokens=4, temperature=0)
    assert answer.choices[0].message.content == "zzzz"


def test_tools_are_called_and_the_conversation_goes_on(client):
    answer = client.chat.completions.create(**ASK, tools=TOOLS, tool_choice="auto")
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", SAID)
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("fly", {"to": "花", "at": 3})
    messages = [QUESTION, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "landed"}]
    answer = client.chat.completions.create(model="bumblebee", messages=messages, tools=TOOLS, tool_choice="none")
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("stop", TEXT)


def test_the_clients_own_reading_of_a_stream_finds_the_call(client):
    with client.chat.completions.stream(**ASK, tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        choice = stream.get_final_completion().choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", SAID)
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"to": "花", "at": 3}
    assert "content.delta" in kinds and "tool_calls.function.arguments.done" in kinds


def test_texts_are_continued(client):
    answer = client.completions.create(model="bumblebee", prompt=["Once", "Twice"], max_tokens=200, echo=True)
    assert [choice.text for choice in answer.choices] == ["Once" + TEXT, "Twice" + TEXT]
    assert answer.usage.completion_tokens > 20
    stream = client.completions.create(model="bumblebee", prompt="Once", max_tokens=200, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXT
    listed = client.completions.create(model="bumblebee", prompt="Once", max_tokens=4, logprobs=1).choices[0].logprobs
    assert len(listed.tokens) == len(listed.token_logprobs) == len(listed.text_offset) == 4


@pytest.mark.anyio
async def test_the_asynchronous_client_asks_and_reads_streams(async_client):
    answer = await async_client.chat.completions.create(**ASK)
    assert answer.choices[0].message.content == TEXT
    stream = await async_client.chat.completions.create(**ASK, stream=True, tools=TOOLS)
    deltas = [chunk.choices[0].delta async for chunk in stream]
    assert "".join(delta.content or "" for delta in deltas) == SAID
    assert [call.function.name for delta in deltas for call in delta.tool_calls or []] == ["fly"]


def refused(kind, ask, **changes):
    with pytest.raises(kind) as caught:
        ask(**{**ASK, **changes})
    assert caught.value.message.startswith("Error code") and caught.value.type  # the client has found OpenAI's error object
    return caught.value


def test_faults_are_the_clients_exceptions(client):
    ask = client.chat.completions.create
    error = refused(openai.BadRequestError, ask, temperature=3)
    assert (error.param, error.code, error.type) == ("temperature", "invalid_value", "invalid_request_error")
    assert "Invalid value for 'temperature': must be at most 2" in str(error)
    assert refused(openai.BadRequestError, ask, extra_body={"tempreature": 1}).code == "unknown_parameter"
    assert refused(openai.BadRequestError, ask, stream=True, n=0).param == "n"
    long = [{"role": "user", "content": "long " * 5000}]
    assert refused(openai.BadRequestError, ask, messages=long).code == "context_length_exceeded"
    assert refused(openai.NotFoundError, ask, model="gpt-4o").code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="bumblebee", input="Hello")


def test_formats_that_are_not_held_are_refused_by_name(client):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    error = refused(openai.BadRequestError, client.chat.completions.create, response_format=schema)
    assert (error.param, error.code) == ("response_format", "unsupported_parameter")


def test_a_wrong_key_is_an_authentication_error(client):
    stranger = client.with_options(api_key="wrong")
    assert refused(openai.AuthenticationError, stranger.chat.completions.create).code == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_more_than_the_queue_takes_is_a_rate_limit(client):
    error = refused(openai.RateLimitError, client.chat.completions.create, n=9)
    assert error.response.headers["retry-after"]
    assert client.chat.completions.create(**ASK).choices[0].message.content == TEXT
