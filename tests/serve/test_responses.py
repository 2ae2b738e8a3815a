"""Responses from a real engine, validated with OpenAI's parts types."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from helpers.echo_model import write_echo_model
from helpers.malformed_bodies import CHAT, COMPLETION
from helpers.tool_call_templates import MARKERS, tokenizer_of
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from bumblebee.inference.engine_config import EngineConfig
from bumblebee.inference.generator import Generator
from bumblebee.inference.request import EngineRequest, PromptToken, RequestOutput, SampledToken
from bumblebee.model import Bumblebee
from serve.api.prompt_logprobs import CompletionLogprobs
from serve.api.requests import RequestBuilder
from serve.api.responses import ChatResponseBuilder, CompletionResponseBuilder
from serve.api.schemas import ChatRequest, CompletionRequest, parse
from serve.api.token_names import TokenNames

ANSWER = "Hé 🐝!"
CALL = '<tool_call>\n{"name": "fly", "arguments": {"to": "花"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "fly", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return Generator.from_pretrained(write_echo_model(tmp_path_factory.mktemp("said"), ANSWER))


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    return Generator.from_pretrained(write_echo_model(tmp_path_factory.mktemp("called"), f"{ANSWER}\n{CALL}\n{CALL}"))


@pytest.fixture(scope="module")
def random_generator(tiny, generator):
    """A random model, whose samples differ."""
    return Generator(Bumblebee(tiny(vocab_size=generator.tokenizer.vocab_size + 3)), generator.tokenizer)


def outputs_of(generator: Generator, requests: list[Any]) -> Iterator[tuple[int, RequestOutput]]:
    engine = generator.engine(EngineConfig())
    for request in requests:
        scored, only = request.prompt_logprobs, request.prompt_only
        engine.submit(
            EngineRequest(str(request.index), request.prompt, request.params, prompt_logprobs=scored, prompt_only=only)
        )
    while engine.busy:
        yield from ((int(output.id), output) for output in engine.step())


def respond(generator: Generator, path: str, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The complete response and the chunks of a stream."""
    config = generator.model.config
    builder = RequestBuilder(generator.tokenizer, config.max_position_embeddings, config.vocab_size)
    response: ChatResponseBuilder | CompletionResponseBuilder
    if path == "chat":
        chat = parse(ChatRequest, json.dumps({**CHAT, **changes}).encode())
        requests, response = (
            builder.chat(chat),
            ChatResponseBuilder(chat, "bumblebee", generator.tokenizer, builder.tool_call_format),
        )
    else:
        body = parse(CompletionRequest, json.dumps({**COMPLETION, **changes}).encode())
        echoes = [builder.echo(prompt) for prompt in body.prompt] if body.echo else None
        requests, response = builder.completion(body), CompletionResponseBuilder(body, "bumblebee", generator.tokenizer, echoes)
    response.prompt_tokens = [len(request.prompt) for request in requests]
    chunks = response.first_chunks()
    for index, output in outputs_of(generator, requests):
        if response.finish_reasons[index] is None:
            chunks += response.add(index, output)
    chunks += response.last_chunks()
    return json.loads(json.dumps(response.body(), allow_nan=False)), json.loads(json.dumps(chunks, allow_nan=False))


def strictly_known(model: openai.BaseModel) -> openai.BaseModel:
    """The object; fails if it has fields that OpenAI's types do not declare."""
    assert not model.model_extra, f"{type(model).__name__}: {model.model_extra}"
    for value in vars(model).values():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, openai.BaseModel):
                strictly_known(part)
    return model


def chat(whole: dict[str, Any]) -> ChatCompletion:
    return strictly_known(ChatCompletion.model_validate(whole, strict=True))


def chat_chunks(chunks: list[dict[str, Any]]) -> list[ChatCompletionChunk]:
    return [strictly_known(ChatCompletionChunk.model_validate(chunk, strict=True)) for chunk in chunks]


def test_chat_response_parses_as_chat_completion(generator):
    answer = chat(respond(generator, "chat")[0])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (ANSWER, "stop")
    assert answer.id.startswith("chatcmpl-") and answer.model == "bumblebee"
    assert answer.choices[0].message.tool_calls is None


def test_stream_has_role_then_text_then_finish_reason(generator):
    chunks = chat_chunks(respond(generator, "chat", stream=True)[1])
    choices = [chunk.choices[0] for chunk in chunks]
    assert choices[0].delta.role == "assistant" and choices[0].delta.content == ""
    assert "".join(choice.delta.content or "" for choice in choices) == ANSWER
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_usage_is_the_last_chunk(generator):
    whole, chunks = respond(generator, "chat", stream=True, stream_options={"include_usage": True})
    *chunks, last = chat_chunks(chunks)
    assert last.choices == [] and last.usage is not None
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    assert last.usage == chat(whole).usage


@pytest.mark.parametrize("path", ["chat", "completion"])
def test_continuous_usage_is_in_every_chunk(generator, path):
    options = {"include_usage": True, "continuous_usage_stats": True}
    whole, chunks = respond(generator, path, stream=True, stream_options=options)
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {whole["usage"]["prompt_tokens"]}
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and len(set(counts)) >= 3
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    alone = respond(generator, path, stream=True, stream_options={"continuous_usage_stats": True})[1]
    assert all(chunk["choices"] and chunk["usage"] for chunk in alone)


def test_usage_counts_a_prompt_once(generator):
    prompt = len(generator.encode_chat("Hello"))
    one, three = (chat(respond(generator, "chat", n=n)[0]).usage for n in (1, 3))
    assert (one.prompt_tokens, three.prompt_tokens) == (prompt, prompt)
    assert (three.completion_tokens, three.total_tokens) == (3 * one.completion_tokens, prompt + 3 * one.completion_tokens)
    assert one.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize("path", ["chat", "completion"])
def test_stream_and_full_response_agree(random_generator, path):
    asked = {"n": 3, "seed": 7, "max_tokens": 20, "logprobs": True if path == "chat" else 3}
    whole, chunks = respond(random_generator, path, **asked)
    for choice in whole["choices"]:
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        text = choice["message"]["content"] if path == "chat" else choice["text"]
        assert "".join(part["delta"].get("content", "") if path == "chat" else part["text"] for part in parts) == text
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]] == ["length"]
        key = "content" if path == "chat" else "tokens"
        assert sum((part["logprobs"][key] for part in parts if part["logprobs"]), []) == choice["logprobs"][key]
    assert len({json.dumps(choice["logprobs"]) for choice in whole["choices"]}) == 3


def test_chat_logprobs_have_names_and_bytes(random_generator):
    answer = chat(respond(random_generator, "chat", logprobs=True, top_logprobs=4, seed=1, max_tokens=60)[0]).choices[0]
    tokens = answer.logprobs.content
    assert len(tokens) == 60 and all(len(token.top_logprobs) == 4 for token in tokens)
    said = b"".join(bytes(token.bytes or b"") for token in tokens)
    assert said.decode(errors="replace") == answer.message.content
    assert any(token.token.startswith("bytes:\\x") for token in tokens)  # many tokens are partial characters
    for token in tokens:
        assert [other.logprob for other in token.top_logprobs] == sorted((o.logprob for o in token.top_logprobs), reverse=True)


def test_special_token_has_a_name_and_no_bytes(generator):
    last = chat(respond(generator, "chat", logprobs=True)[0]).choices[0].logprobs.content[-1]
    assert (last.token, last.bytes) == ("<|im_end|>", None)


def test_impossible_token_has_a_finite_logprob(generator):
    response = ChatResponseBuilder(
        parse(ChatRequest, json.dumps({**CHAT, "logprobs": True}).encode()), "m", generator.tokenizer
    )
    response.add(0, RequestOutput("0", "a", [SampledToken(5, float("-inf"), [(6, float("-inf"))])], "stop", 1, 0))
    entry = chat(response.body()).choices[0].logprobs.content[0]
    assert (entry.logprob, entry.top_logprobs[0].logprob) == (-9999.0, -9999.0)


def test_tool_calls_are_removed_from_the_text(caller):
    choice = chat(respond(caller, "chat", tools=TOOLS)[0]).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", ANSWER)
    assert [(call.type, call.function.name) for call in choice.message.tool_calls] == [("function", "fly")] * 2
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [{"to": "花"}] * 2
    assert len({call.id for call in choice.message.tool_calls}) == 2


@pytest.mark.parametrize("n", [1, 2])
def test_answer_ends_with_its_only_permitted_call(caller, n):
    whole, chunks = respond(caller, "chat", tools=TOOLS, parallel_tool_calls=False, stream=True, n=n)
    assert [len(choice.message.tool_calls) for choice in chat(whole).choices] == [1] * n
    assert {choice.finish_reason for choice in chat(whole).choices} == {"tool_calls"}
    assert sum(len(chunk.choices[0].delta.tool_calls or ()) for chunk in chat_chunks(chunks)) == n
    unlimited = respond(caller, "chat", tools=TOOLS, parallel_tool_calls=True, n=n)[0]
    assert whole["usage"]["completion_tokens"] < unlimited["usage"]["completion_tokens"]


def test_stream_has_text_and_then_each_call(caller):
    whole, chunks = respond(caller, "chat", tools=TOOLS, stream=True)
    choices = [chunk.choices[0] for chunk in chat_chunks(chunks)]
    assert "".join(choice.delta.content or "" for choice in choices) == ANSWER
    calls = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert [call.index for call in calls] == [0, 1]
    assert [call.id for call in calls] == [call["id"] for call in whole["choices"][0]["message"]["tool_calls"]]
    assert choices[-1].finish_reason == "tool_calls"


CALLS = {
    "mistral": '[TOOL_CALLS] [{"name": "fly", "arguments": {"to": "花"}, "id": "123456789"}]',
    "heads": '[TOOL_CALLS]fly[ARGS]{"to": "花"}',
    "llama": '{"name": "fly", "parameters": {"to": "花"}}',
    "deepseek": '[CALLS][CALL]function[SEP]fly\n```json\n{"to": "花"}\n```[/CALL][/CALLS]',
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_between_special_tokens_are_parsed(tmp_path, name):
    model = write_echo_model(tmp_path / "model", CALLS[name], tokenizer_of(name, tmp_path / "tokenizer"))
    answers = [respond(Generator.from_pretrained(model), "chat", **asked)[0] for asked in ({"tools": TOOLS}, {})]
    called, said = (chat(answer).choices[0] for answer in answers)
    assert (called.finish_reason, called.message.content) == ("tool_calls", None)
    assert [json.loads(call.function.arguments) for call in called.message.tool_calls] == [{"to": "花"}]
    assert said.message.tool_calls is None and not any(marker in said.message.content for marker in MARKERS)


@pytest.mark.parametrize("asked", [{}, {"tools": TOOLS, "tool_choice": "none"}])
def test_call_without_tools_is_text(caller, asked):
    choice = chat(respond(caller, "chat", **asked)[0]).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("stop", f"{ANSWER}\n{CALL}\n{CALL}")


def test_truncated_call_is_text(caller):
    choice = chat(respond(caller, "chat", tools=TOOLS, max_tokens=12)[0]).choices[0]
    assert choice.finish_reason == "length" and choice.message.tool_calls is None
    assert choice.message.content.startswith(ANSWER) and CALL not in choice.message.content


def test_completion_response_parses_as_completion(generator):
    whole = respond(generator, "completion", prompt=["a", "b c"], n=2, max_tokens=99)[0]
    answer = strictly_known(Completion.model_validate(whole, strict=True))
    assert [choice.text for choice in answer.choices] == [ANSWER] * 4
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    ids = [generator.encode(prompt) for prompt in ("a", "b c")]
    assert answer.usage.prompt_tokens == sum(map(len, ids)) and answer.id.startswith("cmpl-")


def test_echo_precedes_the_completion(generator):
    whole, chunks = respond(generator, "completion", prompt=["a", "b c"], echo=True, max_tokens=99)
    assert [choice["text"] for choice in whole["choices"]] == ["a" + ANSWER, "b c" + ANSWER]
    for choice in whole["choices"]:
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]


PROMPTS = ["é 🐝 <|im_end|>b", [5, 6, 0, 7]]  # special tokens, and tokens that are a part of a character


def joined(parts: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [value for part in parts if part for value in part[key]] for key in parts[0]}


@pytest.mark.parametrize("prompt", PROMPTS, ids=["text", "ids"])
@pytest.mark.parametrize("max_tokens", [0, 99])
def test_echoed_prompt_has_logprobs(generator, prompt, max_tokens):
    whole, chunks = respond(generator, "completion", prompt=prompt, n=2, echo=True, logprobs=2, max_tokens=max_tokens)
    answer = strictly_known(Completion.model_validate(without_null_tops(whole), strict=True))
    ids = generator.tokenizer.prompt_ids(prompt, True) if isinstance(prompt, str) else prompt
    text = generator.tokenizer.decode(ids, skip_special_tokens=False) + (ANSWER if max_tokens else "")
    for choice, raw in zip(answer.choices, whole["choices"], strict=True):
        logprobs = raw["logprobs"]
        assert choice.text == text and choice.finish_reason == ("stop" if max_tokens else "length")
        assert len(logprobs["tokens"]) == len(ids) + answer.usage.completion_tokens / 2
        assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
        for token, value, top in list(zip(*(logprobs[key] for key in list(logprobs)[:3]), strict=True))[1:]:
            assert top[token] == value <= max(top.values()) <= 0 and len(top) <= 3
        for token, offset in list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))[:-1]:
            assert token.startswith("bytes:") or text[offset : offset + len(token)] == token
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice.index]
        assert "".join(part["text"] for part in parts) == text
        assert joined([part["logprobs"] for part in parts]) == logprobs


def without_null_tops(whole: dict[str, Any]) -> dict[str, Any]:
    """The response with an object for the null of a prompt's first token, which OpenAI's type does not foresee."""
    changed = json.loads(json.dumps(whole))
    for choice in changed["choices"]:
        choice["logprobs"]["token_logprobs"][0], choice["logprobs"]["top_logprobs"][0] = 0.0, {}
    return changed


def test_echo_without_new_tokens(generator):
    whole, chunks = respond(generator, "completion", prompt="b c", echo=True, max_tokens=0)
    [choice] = whole["choices"]
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == ("b c", None, "length")
    assert whole["usage"]["completion_tokens"] == 0
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "b c"


def test_begin_of_text_takes_no_room_in_an_echo(generator):
    names = TokenNames(generator.tokenizer)
    logprobs = CompletionLogprobs(names, 0)
    logprobs.add_prompt([PromptToken(id, -1.0, 1) for id in (0, *generator.tokenizer.encode("ab"))], "ab")
    assert logprobs.whole["text_offset"][:2] == [0, 0]


@pytest.mark.parametrize("path", ["chat", "completion"])
def test_prompt_logprobs_have_vllms_shape(generator, path):
    whole, _ = respond(generator, path, prompt_logprobs=2, max_tokens=1)
    if path == "chat":
        ids = generator.encode_chat("Hello")
        places = whole["prompt_logprobs"]
    else:
        ids, places = generator.encode("Hello"), whole["choices"][0]["prompt_logprobs"]
    assert places[0] is None and len(places) == len(ids) == whole["usage"]["prompt_tokens"]
    for id, place in list(zip(ids, places, strict=True))[1:]:
        own, ranks = place[str(id)], [entry["rank"] for entry in place.values()]
        assert own["logprob"] <= 0 and own["decoded_token"] == TokenNames(generator.tokenizer).name(id)
        assert {1, 2} <= set(ranks) and len(place) in (2, 3)


def test_text_offsets_index_the_text(generator):
    whole = respond(generator, "completion", logprobs=2, max_tokens=99)[0]
    choice = strictly_known(Completion.model_validate(whole, strict=True)).choices[0]
    tokens, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
    for token, offset in zip(tokens, offsets, strict=True):
        if not token.startswith(("bytes:", "<|im_end|>")):
            assert choice.text[offset : offset + len(token)] == token
    assert offsets[-1] == len(choice.text) and tokens[-1] == "<|im_end|>"
    assert all(token in top for token, top in zip(tokens, choice.logprobs.top_logprobs, strict=True))
    assert len(tokens) == len(choice.logprobs.token_logprobs) == whole["usage"]["completion_tokens"]
