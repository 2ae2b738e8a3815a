"""Engine requests from bodies: builder, sampling parameters, and rejected requests."""

from __future__ import annotations

import json

import pytest
from helpers import chat_folders
from helpers.malformed_bodies import CHAT, COMPLETION, MALFORMED
from helpers.tool_call_templates import tokenizer_of
from tokenizers.processors import TemplateProcessing

from bumblebee.inference.sampling.sampling_params import SamplingParams
from bumblebee.tokenizer.chat_template import ChatTemplate
from bumblebee.tokenizer.tokenizer import Tokenizer
from serve.api.errors import APIError
from serve.api.requests import RequestBuilder
from serve.api.schemas import ChatRequest, CompletionRequest, TokenizeRequest, parse

TOOLS = [{"type": "function", "function": {"name": "fly", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def builder(tokenizer):
    return RequestBuilder(tokenizer, 256, 400)


def chat(builder, **changes):
    return builder.chat(parse(ChatRequest, json.dumps({**CHAT, **changes}).encode()))


def completion(builder, **changes):
    return builder.completion(parse(CompletionRequest, json.dumps({**COMPLETION, **changes}).encode()))


def text_of(builder, requests):
    return builder.tokenizer.decode(requests[0].prompt, skip_special_tokens=False)


@pytest.mark.parametrize("malformed", MALFORMED, ids=lambda malformed: malformed.name)
def test_malformed_body_is_rejected_with_param_and_rule(builder, malformed):
    schema, requests = (
        (ChatRequest, builder.chat) if malformed.path == "/v1/chat/completions" else (CompletionRequest, builder.completion)
    )
    with pytest.raises(APIError) as caught:
        requests(parse(schema, malformed.body))
    error = caught.value
    assert (error.status, error.type, error.param) == (400, "invalid_request_error", malformed.param)
    assert malformed.says in error.message
    assert len(error.message) < 300 and "\n" not in error.message


def test_malformed_body_names_are_unique():
    assert len({malformed.name for malformed in MALFORMED}) == len(MALFORMED)


def test_chat_prompt_ends_where_the_answer_starts(builder):
    assert text_of(builder, chat(builder)) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_special_token_in_a_message_is_text(builder, tokenizer):
    prompt = chat(builder, messages=[{"role": "user", "content": "<|im_end|>"}])[0].prompt
    assert prompt.count(tokenizer.token_to_id("<|im_end|>")) == 1


def test_server_system_prompt_is_a_default(tokenizer):
    builder = RequestBuilder(tokenizer, 256, 400, system_prompt="Be schema.")
    assert text_of(builder, chat(builder)).startswith("<|im_start|>system\nBe schema.<|im_end|>")
    own = [{"role": "developer", "content": "Be brief."}, *CHAT["messages"]]
    text = text_of(builder, chat(builder, messages=own))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>") and "schema" not in text


def test_only_chats_stop_at_the_end_of_turn(builder, tokenizer):
    assert chat(builder)[0].params.stop_ids == [tokenizer.token_to_id("<|im_end|>")]
    assert completion(builder)[0].params.stop_ids == chat(builder, ignore_eos=True)[0].params.stop_ids == []


def test_request_overrides_server_defaults(tokenizer):
    builder = RequestBuilder(tokenizer, 256, 400, SamplingParams(temperature=0.3, top_k=7, stop=["x"]))
    params = chat(builder, temperature=0, stop=["y", "z"], logit_bias={"5": 1}, top_p=0)[0].params
    assert (params.temperature, params.top_k, params.stop, params.logit_bias) == (0.0, 7, ["y", "z"], {5: 1.0})
    assert 0 < params.top_p < 1e-6


def test_default_max_tokens(builder, tokenizer):
    assert chat(RequestBuilder(tokenizer, 10_000, 400))[0].params.max_new_tokens == 2048
    asked = chat(builder)[0]
    assert asked.params.max_new_tokens == 256 - len(asked.prompt)
    assert completion(builder)[0].params.max_new_tokens == 16
    bounded = RequestBuilder(tokenizer, 256, 400, max_new_tokens=40)
    assert [chat(bounded)[0].params.max_new_tokens, completion(bounded)[0].params.max_new_tokens] == [40, 40]
    assert chat(bounded, max_tokens=50)[0].params.max_new_tokens == 50
    assert chat(bounded, max_completion_tokens=60)[0].params.max_new_tokens == 60


def test_fields_of_vllm_become_sampling_params(builder):
    params = completion(builder, top_k=-1, stop_token_ids=[3, 5], min_tokens=20, include_stop_str_in_output=True)[0].params
    assert (params.top_k, params.stop_ids, params.min_new_tokens, params.include_stop_str_in_output) == (0, [3, 5], 20, True)
    assert params.max_new_tokens == 20, "the default, 16, is less"
    assert completion(builder, max_tokens=30, min_tokens=30)[0].params.max_new_tokens == 30


def test_sample_seeds_do_not_depend_on_n(builder):
    seeds = [choice.params.seed for choice in chat(builder, n=4, seed=-7)]
    assert len(set(seeds)) == 4 and seeds[0] == -7
    assert seeds[:2] == [choice.params.seed for choice in chat(builder, n=2, seed=-7)]
    assert [choice.params.seed for choice in chat(builder, n=2)] == [None, None]


def test_choices_are_ordered_by_prompt(builder):
    requests = completion(builder, prompt=[[5], [6, 7]], n=2)
    assert [(choice.index, choice.prompt) for choice in requests] == [(0, [5]), (1, [5]), (2, [6, 7]), (3, [6, 7])]


def test_logprobs_of_each_endpoint(builder):
    assert [chat(builder, **asked)[0].params.logprobs for asked in ({}, {"logprobs": True, "top_logprobs": 3})] == [None, 3]
    assert chat(builder, logprobs=True)[0].params.logprobs == 0
    assert completion(builder, logprobs=2)[0].params.logprobs == 2


@pytest.mark.parametrize(
    ("ask", "changes", "numbers"),
    [
        (completion, {"prompt": [5] * 256}, ("256 tokens", "256 in the prompt")),
        (chat, {"messages": [{"role": "user", "content": "Hello " * 200}]}, ("256 tokens",)),
    ],
)
def test_long_prompt_error_reports_token_counts(builder, ask, changes, numbers):
    with pytest.raises(APIError) as caught:
        ask(builder, **changes)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    assert all(number in caught.value.message for number in numbers)


@pytest.mark.parametrize("max_tokens", [56, 57, 10**12])
def test_max_tokens_are_capped_at_the_context(builder, max_tokens):
    assert completion(builder, prompt=[5] * 200, max_tokens=max_tokens)[0].params.max_new_tokens == 56
    asked = chat(builder, max_completion_tokens=max_tokens * 10)[0]
    assert asked.params.max_new_tokens == 256 - len(asked.prompt)


RENDERED = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def tokenize(builder, **body):
    return builder.tokenize(parse(TokenizeRequest, json.dumps(body).encode()))


def test_rendered_template_is_the_chats_prompt(builder):
    ids = chat(builder)[0].prompt
    assert completion(builder, prompt=RENDERED)[0].prompt == ids == tokenize(builder, prompt=RENDERED)
    assert builder.tokenizer.decode(ids, skip_special_tokens=False) == RENDERED


def test_parse_special_false_reads_plain_text(builder, tokenizer):
    ids = completion(builder, prompt=RENDERED, parse_special=False)[0].prompt
    assert ids == tokenize(builder, prompt=RENDERED, parse_special=False) == tokenizer.encode(RENDERED)
    assert not tokenizer.special_ids & set(ids)


def test_begin_of_text_is_added_once(tmp_path):
    backend = chat_folders.byte_level()
    backend.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    tokenizer = Tokenizer.from_pretrained(chat_folders.write(tmp_path, backend, chat_folders.LLAMA))
    builder, [begin] = RequestBuilder(tokenizer, 256, 400), tokenizer.prefix_ids
    plain = tokenizer.encode("Hello")
    assert tokenize(builder, prompt="Hello") == tokenize(builder, prompt="<s>Hello") == [begin, *plain]
    assert completion(builder, prompt="Hello", add_special_tokens=False)[0].prompt == plain


def test_tool_choice_none_hides_tools_from_the_prompt(builder):
    assert '{"name": "fly", "parameters": {"type": "object"}}' in text_of(builder, chat(builder, tools=TOOLS))
    assert chat(builder, tools=TOOLS, tool_choice="none") == chat(builder)


def test_earlier_calls_and_results_are_rendered(tokenizer):
    builder = RequestBuilder(tokenizer, 1024, 400)
    call = {"id": "c1", "type": "function", "function": {"name": "fly", "arguments": '{"to": "花"}'}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "landed"}
    text = text_of(builder, chat(builder, messages=[*CHAT["messages"], answer, result], tools=TOOLS))
    assert '<tool_call>\n{"name": "fly", "arguments": {"to": "花"}}\n</tool_call>' in text
    assert "<tool_response>\nlanded\n</tool_response>" in text


def test_special_call_markers_are_decoded(tmp_path):
    builder = RequestBuilder(tokenizer_of("mistral", tmp_path), 256, 400)
    mark = builder.tokenizer.token_to_id("[TOOL_CALLS]")
    assert chat(builder, tools=TOOLS)[0].params.spelled_ids == [mark]
    assert chat(builder)[0].params.spelled_ids == []


def test_tools_without_template_support_are_rejected(tmp_path):
    tokenizer = Tokenizer.from_pretrained(chat_folders.write(tmp_path, chat_folders.byte_level(), chat_folders.LLAMA))
    with pytest.raises(APIError, match="Tools are not supported") as caught:
        chat(RequestBuilder(tokenizer, 256, 400), tools=TOOLS)
    assert (caught.value.status, caught.value.param) == (400, "tools")


def test_template_error_does_not_reveal_paths(tmp_path):
    tokenizer = Tokenizer.from_pretrained(chat_folders.write(tmp_path, chat_folders.byte_level(), chat_folders.MISTRAL))
    with pytest.raises(APIError, match="must take turns") as caught:
        chat(RequestBuilder(tokenizer, 256, 400), messages=CHAT["messages"] * 2)
    assert str(tmp_path) not in caught.value.message and caught.value.status == 400


def test_model_without_chat_template_only_completes(tmp_path):
    tokenizer = Tokenizer(chat_folders.byte_level(), {"chat_template": "{% broken"}, str(tmp_path))
    builder = RequestBuilder(tokenizer, 256, 400)
    with pytest.raises(APIError, match="no chat template; use /v1/completions") as caught:
        chat(builder)
    assert caught.value.code == "no_chat_template"
    assert completion(builder)[0].prompt == tokenizer.encode("Hello")


def test_name_is_up_to_the_template(builder, tmp_path):
    named = [{"role": "user", "content": "Hello", "name": "ada"}]
    assert chat(builder, messages=named) == chat(builder)
    template = "{% for message in messages %}{{ message.name }}: {{ message.content }}{% endfor %}"
    tokenizer = Tokenizer.from_pretrained(chat_folders.write(tmp_path, chat_folders.byte_level(), template))
    assert tokenizer.decode(chat(RequestBuilder(tokenizer, 256, 400), messages=named)[0].prompt) == "ada: Hello"


def test_name_of_a_tool_result_may_be_dropped(tokenizer):
    call = {"id": "c1", "type": "function", "function": {"name": "fly", "arguments": "{}"}}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "2", "name": "fly"}]
    assert chat(RequestBuilder(tokenizer, 1024, 400), messages=[*CHAT["messages"], *turns])


def test_calls_dropped_by_the_template_are_rejected(tmp_path):
    tokenizer = Tokenizer.from_pretrained(chat_folders.write(tmp_path, chat_folders.byte_level(), chat_folders.LLAMA))
    call = {"id": "c1", "type": "function", "function": {"name": "fly", "arguments": "{}"}}
    with pytest.raises(APIError, match="does not support tool calls \\('fly'\\)"):
        chat(RequestBuilder(tokenizer, 256, 400), messages=[*CHAT["messages"], {"role": "assistant", "tool_calls": [call]}])


def test_rendering_count_does_not_grow_with_calls(tokenizer, monkeypatch):
    rendered = []
    monkeypatch.setattr(ChatTemplate, "render", lambda *args, render=ChatTemplate.render: rendered.append(0) or render(*args))
    call = {"id": "c1", "type": "function", "function": {"name": "fly", "arguments": "{}"}}

    def renderings(calls):
        rendered.clear()
        messages = [*CHAT["messages"], {"role": "assistant", "tool_calls": [call] * calls}]
        chat(RequestBuilder(tokenizer, 8192, 400), messages=messages)
        return len(rendered)

    assert renderings(100) == renderings(2)


def test_tokenize_matches_the_prompt(builder, tokenizer):
    body = parse(TokenizeRequest, json.dumps({"messages": CHAT["messages"]}).encode())
    assert builder.tokenize(body) == chat(builder)[0].prompt
    assert builder.tokenize(parse(TokenizeRequest, b'{"prompt": "Hello"}')) == tokenizer.encode("Hello")


def test_echo_is_the_text_of_the_prompt(builder, tokenizer):
    assert [builder.echo("Hello"), builder.echo(tokenizer.encode("Hello"))] == ["Hello", "Hello"]
