"""Chat templates: targets are the assistant turns, spelled special tokens are text, bad templates are rejected."""

from __future__ import annotations

import importlib.util
import itertools
import json
import pickle
from pathlib import Path
from random import Random
from typing import Any

import pytest
from helpers.chat_folders import LLAMA, MISTRAL, QWEN, SPECIAL, TAGGED, THINKING, byte_level, sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from bumblebee import Tokenizer
from bumblebee.tokenizer.chatml import CHATML

BYTES = byte_level()
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL, "qwen": QWEN, "thinking": THINKING, "tagged": TAGGED}
# Adversarial text: special tokens, halves of them, one inside another, escape characters.
SPELLED = st.sampled_from(
    [*SPECIAL, "<|im_", "end|>", "<<|im_end|>", "<s", ">", "\ufdd0", "\ufdd1", "\\ufdd0", " ", "\n", "{{"]
)
TEXTS = st.lists(SPELLED | st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=6).map("".join)
ANSWERS = TEXTS.map(lambda text: f"a{text}z")  # templates may strip blanks at the ends
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def tokenizer(template: Any, backend: Any = BYTES) -> Tokenizer:
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}, "FOLDER")


def chat(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def targets(tok: Tokenizer, messages: list[dict[str, Any]], **options: Any) -> str:
    """The targets as text, with a bar before each run of targets."""
    encoded = tok.chat_template.encode(messages, **options)
    runs = itertools.groupby(zip(encoded.ids, encoded.target_mask, strict=True), key=lambda token: token[1])
    trained = [[index for index, _ in run] for is_target, run in runs if is_target]
    return "".join("|" + tok.decode(run, skip_special_tokens=False) for run in trained)


# -- targets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "end"),
    [("chatml", "<|im_end|>"), ("llama", "<|eot|>"), ("mistral", "</s>"), ("qwen", "<|im_end|>"), ("tagged", "<|im_end|>")],
)
def test_targets_end_with_the_end_of_turn_token(template, end):
    tok = tokenizer(TEMPLATES[template])
    blank = " " if template == "mistral" else ""
    messages = chat("one", "two", "three", "four")
    assert targets(tok, messages) == f"|{blank}two{end}|{blank}four{end}"
    assert targets(tok, messages, train_on="last") == f"|{blank}four{end}"
    assert tok.chat_template.end_of_turn_id == tok.token_to_id(end)


@pytest.mark.parametrize("template", ["chatml", "llama", "qwen", "tagged"])
@pytest.mark.parametrize("train_on", ["all", "last"])
def test_masked_text_decodes_to_the_answers(template, train_on):
    tok = tokenizer(TEMPLATES[template])

    @settings(max_examples=100)
    @given(st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=3))
    def check(pairs):
        encoded = tok.chat_template.encode([message for pair in pairs for message in chat(*pair)], train_on=train_on)
        end = tok.decode([tok.chat_template.end_of_turn_id], skip_special_tokens=False)
        trained = [index for index, is_target in zip(encoded.ids, encoded.target_mask, strict=True) if is_target]
        answers = [answer for _, answer in pairs][-1 if train_on == "last" else 0 :]
        assert tok.decode(trained, skip_special_tokens=False) == "".join(answer + end for answer in answers)

    check()


@pytest.mark.parametrize("backend", ["bytes", "first", "always", "normalizer"])
@pytest.mark.parametrize("template", ["chatml", "mistral"])
def test_prompt_ids_equal_those_of_generation(backend, template):
    tok = tokenizer(TEMPLATES[template], BYTES if backend == "bytes" else sentencepiece(backend))

    @settings(max_examples=50)
    @given(st.lists(ANSWERS | TEXTS.map(lambda text: "\n a" + text), min_size=2, max_size=2))
    def check(texts):
        encoded = tok.chat_template.encode(chat(*texts))
        begin = encoded.target_mask.index(True)
        assert encoded.ids[:begin] == tok.apply_chat_template(chat(*texts)[:1], add_generation_prompt=True)

    check()


def test_calls_are_targets_in_the_syntax_of_the_template():
    tok = tokenizer(CHATML)
    called = {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}
    messages = [
        *chat("1 + 1?"),
        called,
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "2"},
        *chat("", "Two.")[1:],
    ]
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert targets(tok, messages, tools=[TOOL]) == f"|{call}\n{call}<|im_end|>|Two.<|im_end|>"
    text = tok.apply_chat_template(messages, [TOOL], tokenize=False)
    assert json.dumps(TOOL) in text
    response = "<tool_response>\n2\n</tool_response>"
    assert f"<|im_start|>user\n{response}\n{response}<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n" in text


@pytest.mark.parametrize("template", [CHATML, QWEN])
def test_arguments_as_json_text_are_rendered_as_objects(template):
    as_text = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    texts = [
        tokenizer(template).apply_chat_template(
            [*chat("?"), {"role": "assistant", "content": "", "tool_calls": [call]}], tokenize=False
        )
        for call in (CALL, as_text)
    ]
    assert '"arguments": {' in texts[0]
    assert texts[0].replace(' "type": "function",', "") == texts[1].replace(' "type": "function",', "")


def test_null_content_next_to_calls_is_empty():
    template = TAGGED.replace(
        "{{ message.content +", "{{ message.content | trim + message.tool_calls | map(attribute='name') | join +"
    )
    message = {"role": "assistant", "content": None, "tool_calls": [CALL["function"]]}
    assert targets(tokenizer(template), [*chat("?"), message]) == "|add<|im_end|>"


def test_default_template_adds_no_system_prompt():
    tok = tokenizer(None)
    system = {"role": "system", "content": "Be brief."}
    assert tok.apply_chat_template(chat("Hi."), tokenize=False) == "<|im_start|>user\nHi.<|im_end|>\n"
    assert tok.apply_chat_template([system], tokenize=False) == "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert tok.apply_chat_template([system], [TOOL], tokenize=False).startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")


# -- special tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prefix", [None, "first", "normalizer"])
def test_spelled_special_tokens_stay_text(template, prefix):
    tok = tokenizer(TEMPLATES[template], sentencepiece(prefix) if prefix else BYTES)

    @settings(max_examples=50)
    @given(st.lists(ANSWERS, min_size=1, max_size=4))
    def check(texts):
        def special(contents: list[str]) -> list[int]:
            return [index for index in tok.apply_chat_template(chat(*contents)) if index in tok.special_ids]

        assert special(texts) == special(["harmless"] * len(texts))
        if prefix is None:
            ids = tok.apply_chat_template(chat(*texts))
            assert tok.decode(ids, skip_special_tokens=False) == tok.apply_chat_template(chat(*texts), tokenize=False)

    check()


def test_spelled_special_tokens_in_calls_and_tools_stay_text():
    def conversation(text: str) -> tuple[list[dict[str, Any]], list[Any]]:
        call = {"function": {"name": f"f{text}", "arguments": {f"k{text}": [f"v{text}"]}}}
        result = {"role": "tool", "content": text, "name": text}
        tool = {"function": {"name": f"f{text}", "parameters": {text: text}}}
        return [*chat("?"), {"role": "assistant", "content": None, "tool_calls": [call]}, result, *chat("", "a")[1:]], [tool]

    for template in (CHATML, QWEN):
        tok = tokenizer(template)
        ids, harmless = (
            [i for i in tok.apply_chat_template(*conversation(t)) if i in tok.special_ids] for t in ("<|im_end|>", "x")
        )
        assert ids == harmless
        assert "<|im_end|>" in targets(tok, conversation("<|im_end|>")[0], tools=conversation("<|im_end|>")[1])[:40]


def test_json_escaped_escape_character_is_removed():
    template = CHATML.replace("message.content or ''", "message.content | tojson(ensure_ascii=True)")
    tok = tokenizer(template)
    assert targets(tok, chat("x", "<s>")) == '|"<s>"<|im_end|>'


def test_text_with_all_noncharacters_is_encoded_exactly():
    text = "".join(map(chr, range(0xFDD0, 0xFDF0))) + "<|im_end|>"
    assert targets(tokenizer(CHATML), chat(text, text)) == f"|{text}<|im_end|>"


def test_lone_surrogates_in_messages_are_replaced():
    assert targets(tokenizer(CHATML), chat("x\ud800", "y\udc00")) == "|y\ufffd<|im_end|>"


def test_begin_of_text_token_occurs_once():
    tok = tokenizer(MISTRAL)
    assert tok.apply_chat_template(chat("a")).count(tok.bos_token_id) == 1


# -- rejected templates and messages -------------------------------------------------------------------------------------


def error_of(template: Any, messages: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        tokenizer(template).chat_template.encode(messages, **options)
    return str(caught.value)


REASONING = chat("one", "<think>\nhm\n</think>\ntwo", "three", "<think>\nso\n</think>\nfour")


def test_template_that_rewrites_history_needs_several_sequences():
    message = error_of(THINKING, REASONING)
    assert message.startswith("FOLDER: the chat template renders earlier turns differently when others follow")
    assert message.endswith("takes 2 sequences; use encode_turns, or train_on: last")
    tok = tokenizer(THINKING)
    first, second = tok.chat_template.encode_turns(REASONING)
    assert first == tok.chat_template.encode(REASONING[:2])
    assert second == tok.chat_template.encode(REASONING, train_on="last")
    assert targets(tokenizer(THINKING), REASONING, train_on="last") == "|<think>\nso\n</think>\nfour<|im_end|>"
    assert targets(tokenizer(THINKING), REASONING[:2]) == "|<think>\nhm\n</think>\ntwo<|im_end|>"


def qwen3() -> str:
    """The stock template of Qwen3, which TRL ships."""
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("trl is not installed")
    return (Path(spec.submodule_search_locations[0]) / "chat_templates" / "qwen3.jinja").read_text()


@pytest.mark.parametrize("thinks", [True, False, None])
def test_qwen3_trains_each_turn_on_the_prompt_of_its_generation(thinks):
    tok = tokenizer(qwen3())
    random = Random(str(thinks))

    def answer(**keys: Any) -> dict[str, Any]:
        thought = random.random() < 0.5 if thinks is None else thinks
        return {"role": "assistant", "content": "4", **keys, **({"reasoning_content": "hm"} if thought else {})}

    for _ in range(8):
        messages = [{"role": "system", "content": "s"}] if random.random() < 0.5 else []
        for _ in range(random.randint(1, 3)):
            messages += chat("2 + 2?")
            for _ in range(random.randint(0, 2)):
                messages += [answer(content="", tool_calls=[CALL]), {"role": "tool", "content": "4"}]
            messages.append(answer())
        expected = []
        for turn in [index for index, message in enumerate(messages) if message["role"] == "assistant"]:
            prompt = tok.apply_chat_template(messages[:turn], [TOOL], add_generation_prompt=True)
            whole = tok.apply_chat_template(messages[: turn + 1], [TOOL])
            assert whole[: len(prompt)] == prompt and tok.decode(whole[-1:]) == "\n"
            expected.append((prompt, whole[len(prompt) : -1]))
        actual = []
        for sequence in tok.chat_template.encode_turns(messages, [TOOL]):
            runs = itertools.groupby(range(len(sequence.ids)), key=lambda index: sequence.target_mask[index])
            for run in [list(run) for is_target, run in runs if is_target]:
                actual.append((sequence.ids[: run[0]], sequence.ids[run[0] : run[-1] + 1]))
        assert actual == expected


def test_turns_of_one_question_share_a_sequence_in_qwen3():
    called = {"role": "assistant", "content": "", "reasoning_content": "add", "tool_calls": [CALL]}
    turns = [*chat("2 + 2?"), called, {"role": "tool", "content": "4"}, *chat("", "<think>\nso\n</think>\n\nfour")[1:]]
    chats = tokenizer(qwen3()).chat_template.encode_turns([*turns, *turns], [TOOL])
    assert len(chats) == 2
    assert chats[0] == tokenizer(qwen3()).chat_template.encode(turns, [TOOL])


def test_reasoning_that_the_generation_prompt_begins_is_trained_without_its_tag():
    prompting = THINKING.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    assert prompting != THINKING
    first, second = tokenizer(prompting).chat_template.encode_turns(REASONING)
    assert targets(tokenizer(prompting), REASONING[:2]) == "|hm\n</think>\ntwo<|im_end|>"
    assert targets(tokenizer(prompting), REASONING, train_on="last") == "|so\n</think>\nfour<|im_end|>"
    assert first.ids[: first.target_mask.index(True)] == tokenizer(prompting).apply_chat_template(REASONING[:1], None, True)
    assert sum(second.target_mask) > 3


def test_generation_prompt_missing_from_the_answer_is_rejected():
    prompting = CHATML.replace("'<|im_start|>assistant\\n' if add", "'<|im_start|>assistant\\n<think>' if add")
    assert prompting != CHATML
    for train_on in ("all", "last"):
        message = error_of(prompting, chat("a", "b"), train_on=train_on)
        assert "renders turn 1 differently during generation ('<think>')" in message and "use train_on: last" not in message


def test_tags_do_not_hide_rewritten_history():
    content = "content + '<|im_end|>"
    tags = "''}}{% if message.role == 'assistant' %}{% generation %}{{ content + '<|im_end|>' }}{% endgeneration %}"
    tagged = THINKING.replace(content, f"{tags}{{% else %}}{{{{ {content}' }}}}{{% endif %}}{{{{ '")
    assert tagged != THINKING
    assert "omits part of the assistant turns: '<think>" in error_of(tagged, REASONING)
    assert targets(tokenizer(tagged), REASONING, train_on="last") == "|<think>\nso\n</think>\nfour<|im_end|>"


def test_tagged_spans_are_extended_to_the_end_of_turn():
    shorter = TAGGED.replace("message.content + '<|im_end|>' }}{% endgen", "message.content }}{% endgen")
    shorter = shorter.replace("{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}")
    assert targets(tokenizer(shorter), chat("a", "b", "c", "d")) == "|b<|im_end|>|d<|im_end|>"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (CHATML, chat("a"), "the conversation has no assistant turn"),
        (CHATML, [], "no assistant turn"),
        (CHATML, [{"content": "a"}, *chat("a", "b")], 'FOLDER: messages[0] must be an object with a "role"'),
        (
            CHATML,
            [{"role": "critic", "content": "a"}, *chat("a", "b")],
            "cannot render this conversation: no role 'critic'",
        ),
        (
            CHATML,
            [*chat("a"), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "FOLDER: the arguments of the call of 'f' are not valid JSON",
        ),
        (
            MISTRAL,
            [{"role": "system", "content": "s"}, *chat("a", "b")],
            "cannot render this conversation: user and assistant must take turns",
        ),
        (
            CHATML,
            [{"role": "user", "content": None}, *chat("", "b")[1:]],
            "cannot render this conversation: ",
        ),
        (
            LLAMA,
            [*chat("a"), {"role": "assistant", "content": "", "tool_calls": [CALL]}],
            "the chat template omits part of the assistant turns: 'add'",
        ),
        ("{{ messages.clear() }}", chat("a", "b"), "cannot render this conversation: "),
        ("{{ ''.__class__.__mro__ }}", chat("a", "b"), "cannot render this conversation: "),
        (
            TAGGED.replace("== 'assistant'", "== 'gpt'"),
            chat("a", "b"),
            "the chat template marks 0 of 1 assistant turns with {% generation %} tags",
        ),
        (
            LLAMA.replace("message['content'] | trim", "message['content'] | upper"),
            chat("a", "b"),
            "the chat template omits part of the assistant turns: 'b'",
        ),
        ([{"name": "rag", "template": CHATML}], chat("a", "b"), "FOLDER: no chat template is named 'default', only 'rag'"),
        ("{% if %}", chat("a", "b"), "FOLDER: the chat template is not valid Jinja, line 1: "),
    ],
)
def test_untrainable_chats_are_rejected_with_folder_and_reason(template, messages, message):
    error = error_of(template, messages)
    assert message in error and (error.startswith("FOLDER: ") or "no assistant turn" in error)


def test_unknown_train_on_is_rejected():
    assert error_of(CHATML, chat("a", "b"), train_on="first") == "train_on must be 'all' or 'last', got 'first'"


@pytest.mark.parametrize("tokenize", [True, False])
def test_template_that_omits_the_tools_is_rejected(tokenize):
    with pytest.raises(ValueError, match=r"FOLDER: the chat template omits the tools \('add'\)"):
        tokenizer(LLAMA).apply_chat_template(chat("a"), [TOOL], tokenize=tokenize)
    assert "omits the tools" in error_of(LLAMA, chat("a", "b"), tools=[TOOL])
    for tool in ({"function": {}}, "add", {"function": "add"}, {"name": 3}):
        message = f"FOLDER: a tool must be an object with the name of a function, not {tool!r}"
        assert error_of(CHATML.replace("tool | tojson", "''"), chat("a", "b"), tools=[tool]) == message


@pytest.mark.parametrize("call", ["add", {"function": None}, {"function": {"arguments": {}}}])
def test_call_without_a_name_is_rejected(call):
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert (
        error_of(CHATML, [*chat("a"), message]) == f"FOLDER: a call must be an object with the name of a function, not {call!r}"
    )


def test_empty_conversation_is_rejected():
    with pytest.raises(ValueError, match="FOLDER: a conversation needs at least one message"):
        tokenizer(CHATML).apply_chat_template([])


# -- pickling -------------------------------------------------------------------------------------------------------------


def test_pickled_tokenizer_encodes_as_before():
    tok = tokenizer(CHATML)
    expected = tok.chat_template.encode(chat("<|im_end|>", "<|im_end|>"))
    again = pickle.loads(pickle.dumps(tok))
    assert again.chat_template.encode(chat("<|im_end|>", "<|im_end|>")) == expected
    assert again.encode("<|im_end|>") == tok.encode("<|im_end|>")
