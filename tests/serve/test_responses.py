"""Answers in OpenAI's form, from what a real engine gives out, read by OpenAI's own types."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from helpers.echo_model import parrot
from helpers.malformed_bodies import CHAT, COMPLETION
from helpers.tool_call_templates import MARKS, tokenizer_of
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from bumblebee.inference.engine_config import GenerationOptions
from bumblebee.inference.generator import Generator
from bumblebee.inference.request import Output, Request, Token
from bumblebee.model import Bumblebee
from serve.requests import RequestBuilder
from serve.responses import ChatResponseBuilder, CompletionResponseBuilder
from serve.schemas import ChatRequest, CompletionRequest, parse

SAID = "Hé 🐝!"
CALL = '<tool_call>\n{"name": "fly", "arguments": {"to": "花"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "fly", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return Generator.from_pretrained(parrot(tmp_path_factory.mktemp("said"), SAID))


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    return Generator.from_pretrained(parrot(tmp_path_factory.mktemp("called"), f"{SAID}\n{CALL}\n{CALL}"))


@pytest.fixture(scope="module")
def babbler(tiny, generator):
    """A model that says something else each time."""
    return Generator(Bumblebee(tiny(vocab_size=generator.tokenizer.vocab_size + 3)), generator.tokenizer)


def outputs_of(generator: Generator, jobs: list[Any]) -> Iterator[tuple[int, Output]]:
    engine = generator.engine(GenerationOptions())
    for job in jobs:
        engine.submit(Request(str(job.index), job.prompt, job.params))
    while engine.busy:
        yield from ((int(output.id), output) for output in engine.step())


def replied(generator: Generator, path: str, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the whole object, the chunks of a stream)."""
    config = generator.model.config
    prompts = RequestBuilder(generator.tokenizer, config.max_position_embeddings, config.vocab_size)
    reply: ChatResponseBuilder | CompletionResponseBuilder
    if path == "chat":
        chat = parse(ChatRequest, json.dumps({**CHAT, **changes}).encode())
        jobs, reply = prompts.chat(chat), ChatResponseBuilder(chat, "bumblebee", generator.tokenizer, prompts.tool_call_format)
    else:
        body = parse(CompletionRequest, json.dumps({**COMPLETION, **changes}).encode())
        echoes = [prompts.echo(prompt) for prompt in body.prompt] if body.echo else None
        jobs, reply = prompts.completion(body), CompletionResponseBuilder(body, "bumblebee", generator.tokenizer, echoes)
    chunks = reply.first_chunks()
    for index, output in outputs_of(generator, jobs):
        chunks += reply.add(index, output)
    chunks += reply.last_chunks()
    return json.loads(json.dumps(reply.body(), allow_nan=False)), json.loads(json.dumps(chunks, allow_nan=False))


def known(model: openai.BaseModel) -> openai.BaseModel:
    """The object, if OpenAI's types know every field of it."""
    assert not model.model_extra, f"{type(model).__name__}: {model.model_extra}"
    for value in vars(model).values():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, openai.BaseModel):
                known(part)
    return model


def chat(whole: dict[str, Any]) -> ChatCompletion:
    return known(ChatCompletion.model_validate(whole, strict=True))


def chat_chunks(chunks: list[dict[str, Any]]) -> list[ChatCompletionChunk]:
    return [known(ChatCompletionChunk.model_validate(chunk, strict=True)) for chunk in chunks]


def test_a_chat_is_a_chat_completion(generator):
    answer = chat(replied(generator, "chat")[0])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (SAID, "stop")
    assert answer.id.startswith("chatcmpl-") and answer.model == "bumblebee"
    assert answer.choices[0].message.tool_calls is None


def test_a_stream_says_who_speaks_then_the_text_then_why_it_ends(generator):
    chunks = chat_chunks(replied(generator, "chat", stream=True)[1])
    choices = [chunk.choices[0] for chunk in chunks]
    assert choices[0].delta.role == "assistant" and choices[0].delta.content == ""
    assert "".join(choice.delta.content or "" for choice in choices) == SAID
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_the_usage_comes_last_in_a_chunk_without_choices(generator):
    whole, chunks = replied(generator, "chat", stream=True, stream_options={"include_usage": True})
    *chunks, last = chat_chunks(chunks)
    assert last.choices == [] and last.usage is not None
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    assert last.usage == chat(whole).usage


def test_the_usage_counts_a_prompt_once_and_every_answer(generator):
    prompt = len(generator.ask("Hello"))
    one, three = (chat(replied(generator, "chat", n=n)[0]).usage for n in (1, 3))
    assert (one.prompt_tokens, three.prompt_tokens) == (prompt, prompt)
    assert (three.completion_tokens, three.total_tokens) == (3 * one.completion_tokens, prompt + 3 * one.completion_tokens)
    assert one.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize("path", ["chat", "completion"])
def test_streams_and_whole_answers_of_several_samples_say_the_same(babbler, path):
    asked = {"n": 3, "seed": 7, "max_tokens": 20, "logprobs": True if path == "chat" else 3}
    whole, chunks = replied(babbler, path, **asked)
    for choice in whole["choices"]:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        text = choice["message"]["content"] if path == "chat" else choice["text"]
        assert "".join(part["delta"].get("content", "") if path == "chat" else part["text"] for part in own) == text
        assert [part["finish_reason"] for part in own if part["finish_reason"]] == [choice["finish_reason"]] == ["length"]
        key = "content" if path == "chat" else "tokens"
        assert sum((part["logprobs"][key] for part in own if part["logprobs"]), []) == choice["logprobs"][key]
    assert len({json.dumps(choice["logprobs"]) for choice in whole["choices"]}) == 3


def test_logprobs_of_a_chat_name_tokens_and_give_their_bytes(babbler):
    answer = chat(replied(babbler, "chat", logprobs=True, top_logprobs=4, seed=1, max_tokens=60)[0]).choices[0]
    tokens = answer.logprobs.content
    assert len(tokens) == 60 and all(len(token.top_logprobs) == 4 for token in tokens)
    said = b"".join(bytes(token.bytes or b"") for token in tokens)
    assert said.decode(errors="replace") == answer.message.content
    assert any(token.token.startswith("bytes:\\x") for token in tokens)  # of this tokenizer's, many are half characters
    for token in tokens:
        assert [other.logprob for other in token.top_logprobs] == sorted((o.logprob for o in token.top_logprobs), reverse=True)


def test_a_special_token_is_named_by_its_spelling_and_has_no_bytes(generator):
    last = chat(replied(generator, "chat", logprobs=True)[0]).choices[0].logprobs.content[-1]
    assert (last.token, last.bytes) == ("<|im_end|>", None)


def test_an_impossible_token_has_a_logprob_that_json_knows(generator):
    reply = ChatResponseBuilder(parse(ChatRequest, json.dumps({**CHAT, "logprobs": True}).encode()), "m", generator.tokenizer)
    reply.add(0, Output("0", "a", [Token(5, float("-inf"), [(6, float("-inf"))])], "stop", 1, 0))
    entry = chat(reply.body()).choices[0].logprobs.content[0]
    assert (entry.logprob, entry.top_logprobs[0].logprob) == (-9999.0, -9999.0)


def test_calls_are_taken_out_of_the_text(caller):
    choice = chat(replied(caller, "chat", tools=TOOLS)[0]).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", SAID)
    assert [(call.type, call.function.name) for call in choice.message.tool_calls] == [("function", "fly")] * 2
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [{"to": "花"}] * 2
    assert len({call.id for call in choice.message.tool_calls}) == 2


def test_a_stream_brings_the_text_and_then_each_call(caller):
    whole, chunks = replied(caller, "chat", tools=TOOLS, stream=True)
    choices = [chunk.choices[0] for chunk in chat_chunks(chunks)]
    assert "".join(choice.delta.content or "" for choice in choices) == SAID
    calls = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert [call.index for call in calls] == [0, 1]
    assert [call.id for call in calls] == [call["id"] for call in whole["choices"][0]["message"]["tool_calls"]]
    assert choices[-1].finish_reason == "tool_calls"


WRITTEN = {
    "mistral": '[TOOL_CALLS] [{"name": "fly", "arguments": {"to": "花"}, "id": "123456789"}]',
    "heads": '[TOOL_CALLS]fly[ARGS]{"to": "花"}',
    "llama": '{"name": "fly", "parameters": {"to": "花"}}',
    "deepseek": '[CALLS][CALL]function[SEP]fly\n```json\n{"to": "花"}\n```[/CALL][/CALLS]',
}


@pytest.mark.parametrize("name", WRITTEN)
def test_calls_are_found_also_between_special_tokens(tmp_path, name):
    model = parrot(tmp_path / "model", WRITTEN[name], tokenizer_of(name, tmp_path / "tokenizer"))
    answers = [replied(Generator.from_pretrained(model), "chat", **asked)[0] for asked in ({"tools": TOOLS}, {})]
    called, said = (chat(answer).choices[0] for answer in answers)
    assert (called.finish_reason, called.message.content) == ("tool_calls", None)
    assert [json.loads(call.function.arguments) for call in called.message.tool_calls] == [{"to": "花"}]
    assert said.message.tool_calls is None and not any(mark in said.message.content for mark in MARKS)


@pytest.mark.parametrize("asked", [{}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_to_call_a_call_is_text(caller, asked):
    choice = chat(replied(caller, "chat", **asked)[0]).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("stop", f"{SAID}\n{CALL}\n{CALL}")


def test_a_call_that_is_cut_off_is_text_and_ends_by_its_length(caller):
    choice = chat(replied(caller, "chat", tools=TOOLS, max_tokens=12)[0]).choices[0]
    assert choice.finish_reason == "length" and choice.message.tool_calls is None
    assert choice.message.content.startswith(SAID) and CALL not in choice.message.content


def test_a_completion_is_a_completion(generator):
    whole = replied(generator, "completion", prompt=["a", "b c"], n=2, max_tokens=99)[0]
    answer = known(Completion.model_validate(whole, strict=True))
    assert [choice.text for choice in answer.choices] == [SAID] * 4
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    ids = [generator.encode(prompt) for prompt in ("a", "b c")]
    assert answer.usage.prompt_tokens == sum(map(len, ids)) and answer.id.startswith("cmpl-")


def test_a_prompt_is_echoed_before_its_continuations(generator):
    whole, chunks = replied(generator, "completion", prompt=["a", "b c"], echo=True, max_tokens=99)
    assert [choice["text"] for choice in whole["choices"]] == ["a" + SAID, "b c" + SAID]
    for choice in whole["choices"]:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]


def test_the_offsets_of_a_completions_logprobs_are_places_in_its_text(generator):
    whole = replied(generator, "completion", logprobs=2, max_tokens=99)[0]
    choice = known(Completion.model_validate(whole, strict=True)).choices[0]
    tokens, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
    for token, offset in zip(tokens, offsets, strict=True):
        if not token.startswith(("bytes:", "<|im_end|>")):
            assert choice.text[offset : offset + len(token)] == token
    assert offsets[-1] == len(choice.text) and tokens[-1] == "<|im_end|>"
    assert all(token in top for token, top in zip(tokens, choice.logprobs.top_logprobs, strict=True))
    assert len(tokens) == len(choice.logprobs.token_logprobs) == whole["usage"]["completion_tokens"]
