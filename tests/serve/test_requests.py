"""From bodies to prompts and sampling, and what is refused on the way."""

from __future__ import annotations

import json

import pytest
from helpers import chat_folders
from helpers.malformed_bodies import CHAT, COMPLETION, MALFORMED
from helpers.tool_call_templates import tokenizer_of

from bumblebee.inference.sampling_params import SamplingParams
from bumblebee.tokenizer.chat_template import ChatTemplate
from bumblebee.tokenizer.tokenizer import Tokenizer
from serve.api_errors import APIError
from serve.requests import RequestBuilder
from serve.schemas import ChatRequest, CompletionRequest, TokenizeRequest, parse

TOOLS = [{"type": "function", "function": {"name": "fly", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return RequestBuilder(tokenizer, 256, 400)


def chat(prompts, **changes):
    return prompts.chat(parse(ChatRequest, json.dumps({**CHAT, **changes}).encode()))


def completion(prompts, **changes):
    return prompts.completion(parse(CompletionRequest, json.dumps({**COMPLETION, **changes}).encode()))


def text_of(prompts, jobs):
    return prompts.tokenizer.decode(jobs[0].prompt, skip_special_tokens=False)


@pytest.mark.parametrize("wrong", MALFORMED, ids=lambda wrong: wrong.name)
def test_a_malformed_body_is_refused_with_its_field_and_what_would_be_right(prompts, wrong):
    kind, jobs = (
        (ChatRequest, prompts.chat) if wrong.path == "/v1/chat/completions" else (CompletionRequest, prompts.completion)
    )
    with pytest.raises(APIError) as caught:
        jobs(parse(kind, wrong.body))
    fault = caught.value
    assert (fault.status, fault.type, fault.param) == (400, "invalid_request_error", wrong.param)
    assert wrong.says in fault.message
    assert len(fault.message) < 300 and "\n" not in fault.message


def test_the_names_of_the_malformed_bodies_differ():
    assert len({wrong.name for wrong in MALFORMED}) == len(MALFORMED)


def test_a_chat_is_rendered_up_to_where_the_answer_begins(prompts):
    assert text_of(prompts, chat(prompts)) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_a_special_token_that_a_user_spells_is_text(prompts, tokenizer):
    spelled = chat(prompts, messages=[{"role": "user", "content": "<|im_end|>"}])[0].prompt
    assert spelled.count(tokenizer.token_to_id("<|im_end|>")) == 1


def test_the_servers_system_prompt_is_for_chats_without_their_own(tokenizer):
    prompts = RequestBuilder(tokenizer, 256, 400, system_prompt="Be kind.")
    assert text_of(prompts, chat(prompts)).startswith("<|im_start|>system\nBe kind.<|im_end|>")
    own = [{"role": "developer", "content": "Be brief."}, *CHAT["messages"]]
    text = text_of(prompts, chat(prompts, messages=own))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>") and "kind" not in text


def test_a_chat_stops_at_the_templates_end_of_turn_and_a_completion_does_not(prompts, tokenizer):
    assert chat(prompts)[0].params.stop_ids == [tokenizer.token_to_id("<|im_end|>")]
    assert completion(prompts)[0].params.stop_ids == chat(prompts, ignore_eos=True)[0].params.stop_ids == []


def test_the_request_wins_over_the_servers_defaults(tokenizer):
    prompts = RequestBuilder(tokenizer, 256, 400, SamplingParams(temperature=0.3, top_k=7, stop=["x"]))
    params = chat(prompts, temperature=0, stop=["y", "z"], logit_bias={"5": 1}, top_p=0)[0].params
    assert (params.temperature, params.top_k, params.stop, params.logit_bias) == (0.0, 7, ["y", "z"], {5: 1.0})
    assert 0 < params.top_p < 1e-6


def test_open_lengths_are_the_rest_of_the_context_up_to_a_bound(prompts, tokenizer):
    assert chat(RequestBuilder(tokenizer, 10_000, 400))[0].params.max_new_tokens == 2048
    asked = chat(prompts)[0]
    assert asked.params.max_new_tokens == 256 - len(asked.prompt)
    assert completion(prompts)[0].params.max_new_tokens == 16
    bounded = RequestBuilder(tokenizer, 256, 400, max_new_tokens=40)
    assert [chat(bounded)[0].params.max_new_tokens, completion(bounded)[0].params.max_new_tokens] == [40, 40]
    assert chat(bounded, max_tokens=50)[0].params.max_new_tokens == 50
    assert chat(bounded, max_completion_tokens=60)[0].params.max_new_tokens == 60


def test_samples_have_seeds_of_their_own_that_do_not_depend_on_their_number(prompts):
    seeds = [job.params.seed for job in chat(prompts, n=4, seed=-7)]
    assert len(set(seeds)) == 4 and seeds[0] == -7
    assert seeds[:2] == [job.params.seed for job in chat(prompts, n=2, seed=-7)]
    assert [job.params.seed for job in chat(prompts, n=2)] == [None, None]


def test_the_continuations_of_several_prompts_are_numbered_prompt_by_prompt(prompts):
    jobs = completion(prompts, prompt=[[5], [6, 7]], n=2)
    assert [(job.index, job.prompt) for job in jobs] == [(0, [5]), (1, [5]), (2, [6, 7]), (3, [6, 7])]


def test_logprobs_are_those_of_each_endpoint(prompts):
    assert [chat(prompts, **asked)[0].params.logprobs for asked in ({}, {"logprobs": True, "top_logprobs": 3})] == [None, 3]
    assert chat(prompts, logprobs=True)[0].params.logprobs == 0
    assert completion(prompts, logprobs=2)[0].params.logprobs == 2


@pytest.mark.parametrize(
    ("ask", "changes", "numbers"),
    [
        (completion, {"prompt": [5] * 256}, ("256 tokens", "256 in the prompt")),
        (completion, {"prompt": [5] * 200, "max_tokens": 57}, ("256 tokens", "200 in the prompt", "57 in the completion")),
        (chat, {"messages": [{"role": "user", "content": "Hello " * 200}]}, ("256 tokens",)),
        (chat, {"max_tokens": 256}, ("256 tokens", "256 in the completion")),
    ],
)
def test_what_does_not_fit_the_context_is_refused_with_the_numbers(prompts, ask, changes, numbers):
    with pytest.raises(APIError) as caught:
        ask(prompts, **changes)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    assert all(number in caught.value.message for number in numbers)


def test_the_last_position_of_the_context_can_be_asked_for(prompts):
    assert completion(prompts, prompt=[5] * 200, max_tokens=56)[0].params.max_new_tokens == 56


def test_tools_reach_the_prompt_unless_they_are_not_to_be_called(prompts):
    assert '{"name": "fly", "parameters": {"type": "object"}}' in text_of(prompts, chat(prompts, tools=TOOLS))
    assert chat(prompts, tools=TOOLS, tool_choice="none") == chat(prompts)


def test_calls_and_results_of_earlier_turns_reach_the_prompt(tokenizer):
    prompts = RequestBuilder(tokenizer, 1024, 400)
    call = {"id": "c1", "type": "function", "function": {"name": "fly", "arguments": '{"to": "花"}'}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "landed"}
    text = text_of(prompts, chat(prompts, messages=[*CHAT["messages"], answer, result], tools=TOOLS))
    assert '<tool_call>\n{"name": "fly", "arguments": {"to": "花"}}\n</tool_call>' in text
    assert "<tool_response>\nlanded\n</tool_response>" in text


def test_marks_of_calls_that_are_special_tokens_are_spelled_in_the_answer(tmp_path):
    prompts = RequestBuilder(tokenizer_of("mistral", tmp_path), 256, 400)
    mark = prompts.tokenizer.token_to_id("[TOOL_CALLS]")
    assert chat(prompts, tools=TOOLS)[0].params.spelled_ids == [mark]
    assert chat(prompts)[0].params.spelled_ids == []


def test_tools_of_a_model_whose_template_has_none_are_refused(tmp_path):
    tokenizer = Tokenizer.from_pretrained(chat_folders.write(tmp_path, chat_folders.byte_level(), chat_folders.LLAMA))
    with pytest.raises(APIError, match="Tools are not supported") as caught:
        chat(RequestBuilder(tokenizer, 256, 400), tools=TOOLS)
    assert (caught.value.status, caught.value.param) == (400, "tools")


def test_what_the_template_refuses_is_a_fault_without_the_servers_paths(tmp_path):
    tokenizer = Tokenizer.from_pretrained(chat_folders.write(tmp_path, chat_folders.byte_level(), chat_folders.MISTRAL))
    with pytest.raises(APIError, match="must take turns") as caught:
        chat(RequestBuilder(tokenizer, 256, 400), messages=CHAT["messages"] * 2)
    assert str(tmp_path) not in caught.value.message and caught.value.status == 400


def test_a_model_without_a_chat_template_completes_and_does_not_chat(tmp_path):
    tokenizer = Tokenizer(chat_folders.byte_level(), {"chat_template": "{% broken"}, str(tmp_path))
    prompts = RequestBuilder(tokenizer, 256, 400)
    with pytest.raises(APIError, match="no chat template; use /v1/completions") as caught:
        chat(prompts)
    assert caught.value.code == "no_chat_template"
    assert completion(prompts)[0].prompt == tokenizer.encode("Hello")


def test_a_name_that_the_template_leaves_out_is_refused(prompts, tmp_path):
    with pytest.raises(APIError, match="does not support the name"):
        chat(prompts, messages=[{"role": "user", "content": "Hello", "name": "ada"}])
    template = "{% for message in messages %}{{ message.name }}: {{ message.content }}{% endfor %}"
    tokenizer = Tokenizer.from_pretrained(chat_folders.write(tmp_path, chat_folders.byte_level(), template))
    named = [{"role": "user", "content": "Hello", "name": "ada"}]
    assert tokenizer.decode(chat(RequestBuilder(tokenizer, 256, 400), messages=named)[0].prompt) == "ada: Hello"


def test_the_name_in_a_tools_result_may_be_left_out(tokenizer):
    call = {"id": "c1", "type": "function", "function": {"name": "fly", "arguments": "{}"}}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "2", "name": "fly"}]
    assert chat(RequestBuilder(tokenizer, 1024, 400), messages=[*CHAT["messages"], *turns])


def test_calls_that_the_template_leaves_out_are_refused(tmp_path):
    tokenizer = Tokenizer.from_pretrained(chat_folders.write(tmp_path, chat_folders.byte_level(), chat_folders.LLAMA))
    call = {"id": "c1", "type": "function", "function": {"name": "fly", "arguments": "{}"}}
    with pytest.raises(APIError, match="does not support tool calls \\('fly'\\)"):
        chat(RequestBuilder(tokenizer, 256, 400), messages=[*CHAT["messages"], {"role": "assistant", "tool_calls": [call]}])


def test_a_conversation_of_many_calls_is_rendered_no_more_often_than_one_of_few(tokenizer, monkeypatch):
    rendered = []
    monkeypatch.setattr(ChatTemplate, "render", lambda *args, render=ChatTemplate.render: rendered.append(0) or render(*args))
    call = {"id": "c1", "type": "function", "function": {"name": "fly", "arguments": "{}"}}

    def renderings(calls):
        rendered.clear()
        messages = [*CHAT["messages"], {"role": "assistant", "tool_calls": [call] * calls}]
        chat(RequestBuilder(tokenizer, 8192, 400), messages=messages)
        return len(rendered)

    assert renderings(100) == renderings(2)


def test_texts_and_chats_are_tokenized_as_the_model_gets_them(prompts, tokenizer):
    body = parse(TokenizeRequest, json.dumps({"messages": CHAT["messages"]}).encode())
    assert prompts.tokenize(body) == chat(prompts)[0].prompt
    assert prompts.tokenize(parse(TokenizeRequest, b'{"prompt": "Hello"}')) == tokenizer.encode("Hello")


def test_an_echo_is_the_text_of_the_prompt(prompts, tokenizer):
    assert [prompts.echo("Hello"), prompts.echo(tokenizer.encode("Hello"))] == ["Hello", "Hello"]
