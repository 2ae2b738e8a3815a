"""Conversations: four formats give the same messages, and every error names file, line and key."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bumblebee import Tokenizer
from datamodules.chat_formats import FORMATS
from datamodules.conversations import parse_conversation, parse_preference, with_system
from datamodules.record_files import read as read_file
from datamodules.record_files import text_of
from datamodules.records import Record, RecordError

ROOT = Path(__file__).parents[2]

CALL = {"name": "weather", "arguments": {"city": "Bern"}}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}],
}
TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
USER, ANSWER = {"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Yes."}
HUMAN, GPT = {"from": "human", "value": "Rain?"}, {"from": "gpt", "value": "Yes."}
SYSTEM = {"role": "system", "content": "Be brief."}


def read(value):
    return parse_conversation(Record("data.jsonl", 7, value))


def read_pair(value):
    return parse_preference(Record("data.jsonl", 7, value))


# -- valid records -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        {"instruction": "Rain?", "output": "Yes."},
        {"instruction": "Rain?", "input": "", "output": "Yes.", "system": "", "history": [], "tools": ""},
        {"instruction": "", "input": "Rain?", "output": "Yes.", "id": 5, "tools": "[]"},
        {"instruction": "Rain?", "input": None, "output": "Yes.", "system": None, "history": None, "tools": None},
        {"conversations": [HUMAN, GPT]},
        {"messages": [USER, ANSWER]},
        {"messages": [USER, {**ANSWER, "tool_calls": None}], "conversations": None},
        {"messages": [USER, {**ANSWER, "tool_calls": []}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Ra"}, {"type": "text", "text": "in?"}]}, ANSWER]},
        {"prompt": "Rain?", "completion": "Yes."},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": "a copy", "messages": [USER, ANSWER]},
    ],
)
def test_all_formats_give_the_same_messages(value):
    parsed = read(value)
    assert parsed.messages == [USER, ANSWER] and parsed.tools is None


@pytest.mark.parametrize(
    "value",
    [
        {"instruction": "And now?", "output": "No.", "system": "Be brief.", "history": [["Rain?", "Yes."]]},
        {
            "conversations": [HUMAN, GPT, {"from": "human", "value": "And now?"}, {"from": "gpt", "value": "No."}],
            "system": "Be brief.",
        },
        {"messages": [SYSTEM, USER, ANSWER, {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "No."}]},
        {
            "prompt": [SYSTEM, USER],
            "completion": [ANSWER, {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "No."}],
        },
    ],
)
def test_all_formats_have_turns_and_system_prompts(value):
    later = [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "No."}]
    assert read(value).messages == [SYSTEM, USER, ANSWER, *later]


def test_input_is_appended_to_the_instruction():
    assert read({"instruction": "Add.", "input": "1 + 1", "output": "2"}).messages[0]["content"] == "Add.\n1 + 1"


@pytest.mark.parametrize(
    "value",
    [
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "wet"},
                GPT,
            ]
        },
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": json.dumps([CALL])},
                {"from": "observation", "value": "wet"},
                GPT,
            ]
        },
        {"messages": [USER, CALLED, {"role": "tool", "content": "wet"}, ANSWER]},
        {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [{**CALL, "arguments": '{"city": "Bern"}'}]},
                {"role": "tool", "content": "wet"},
                ANSWER,
            ]
        },
    ],
)
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [{"type": "function", "function": TOOL}]])
def test_calls_results_and_tools_are_normalized(value, tools):
    parsed = read({**value, "tools": tools})
    assert parsed.messages == [USER, CALLED, {"role": "tool", "content": "wet"}, ANSWER]
    assert parsed.tools == [{"type": "function", "function": TOOL}]


def test_other_message_keys_are_kept():
    call = {**CALLED, "tool_calls": [{**CALLED["tool_calls"][0], "id": "abc"}], "reasoning_content": "hm"}
    result = {"role": "tool", "content": "", "tool_call_id": "abc", "name": "weather"}
    assert read({"messages": [USER, call, result, ANSWER]}).messages == [USER, call, result, ANSWER]


@pytest.mark.parametrize(
    "value",
    [
        {"instruction": "Rain?", "chosen": "Yes.", "rejected": "No."},
        {"instruction": "Rain?", "input": "", "output": None, "chosen": "Yes.", "rejected": "No."},
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "No."}},
        {"messages": [USER], "chosen": ANSWER, "rejected": {"role": "assistant", "content": "No."}},
        {"prompt": "Rain?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "No."}]},
        {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "No."}]},
        {"prompt": "a copy", "chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "No."}]},
        {"chosen": [HUMAN, GPT], "rejected": [HUMAN, {"from": "gpt", "value": "No."}]},
    ],
)
def test_all_formats_give_the_same_preference_pair(value):
    parsed = read_pair(value)
    assert (parsed.prompt, parsed.chosen, parsed.rejected) == ([USER], ANSWER, {"role": "assistant", "content": "No."})
    assert parsed.tools is None


def test_preferences_after_tool_results_and_between_calls():
    turns = [HUMAN, {"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "wet"}]
    assert read_pair({"conversations": turns, "chosen": GPT, "rejected": {**GPT, "value": "No."}}).prompt[-1]["role"] == "tool"
    call = {"from": "function_call", "value": json.dumps(CALL)}
    assert read_pair({"conversations": [HUMAN], "chosen": call, "rejected": GPT, "tools": [TOOL]}).chosen == CALLED


def test_system_prompt_of_the_record_takes_precedence():
    assert with_system([USER, ANSWER], "Be brief.") == [SYSTEM, USER, ANSWER]
    assert with_system([USER, ANSWER], None) == with_system([USER, ANSWER], "") == [USER, ANSWER]
    own = [{"role": "system", "content": "Be long."}, USER, ANSWER]
    assert with_system(own, "Be brief.") == own


# -- errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        # which format
        (
            {},
            "expected exactly one of the keys 'instruction' or 'conversations' or 'messages' or 'prompt'",
        ),
        ({"text": "a", "id": 1}, "the record's keys: 'text', 'id'"),
        ({"messages": [USER, ANSWER], "instruction": "a"}, "exactly one of the keys"),
        (
            {"instruction": "a", "chosen": "b", "rejected": "c"},
            "the key 'chosen' makes this a preference pair, not a conversation",
        ),
        # TRL
        ({"prompt": "a"}, "no key 'completion', the answer to 'prompt'"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"prompt": "a", "completion": 1}, "'completion' must be a string or a list of messages, not a number"),
        ({"prompt": 1, "completion": "b"}, "'prompt' must be a string or a list of messages, not a number"),
        # Alpaca
        ({"instruction": "a"}, "no key 'output', the answer to 'instruction'"),
        ({"instruction": "a", "output": " \n"}, "'output' is empty"),
        ({"instruction": "a", "output": ["b"]}, "'output' must be a string, not an array"),
        ({"instruction": 1, "output": "b"}, "'instruction' must be a string, not a number"),
        ({"instruction": "", "input": " ", "output": "b"}, "'instruction' is empty"),
        ({"instruction": "a", "input": {}, "output": "b"}, "'input' must be a string, not an object"),
        ({"instruction": "a", "output": "b", "system": True}, "'system' must be a string, not true"),
        ({"instruction": "a", "output": "b", "history": "x"}, "'history' must be a list, not a string"),
        (
            {"instruction": "a", "output": "b", "history": [["x"]]},
            "'history'[0] must be a list of a question and its answer, not an array",
        ),
        ({"instruction": "a", "output": "b", "history": [["q", "r"], ["x", ""]]}, "'history'[1] is empty"),
        # ShareGPT
        ({"conversations": []}, "'conversations' is empty"),
        ({"conversations": {}}, "'conversations' must be a list, not an object"),
        ({"conversations": ["a"]}, "'conversations'[0] must be an object, not a string"),
        ({"conversations": [USER]}, "'conversations'[0] has no 'from'; its keys: 'role', 'content'"),
        (
            {"conversations": [{"from": "user", "value": "a"}]},
            "'conversations'[0]: 'from' must be one of system, human, gpt, function_call, observation, not 'user'",
        ),
        ({"conversations": [HUMAN, {"from": "gpt"}]}, "'conversations'[1] has no 'value'"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": ""}]}, "'conversations'[1]: 'value' is empty"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": None}]}, "'conversations'[1]: 'value' must be a string, not null"),
        ({"conversations": [HUMAN]}, "'conversations'[0]: a conversation must end with 'gpt', not 'human'"),
        (
            {"conversations": [GPT, HUMAN]},
            "'conversations'[0]: 'gpt' cannot come first; expected 'system' or 'human'",
        ),
        (
            {"conversations": [HUMAN, HUMAN, GPT]},
            "'conversations'[1]: 'human' cannot follow 'human'; expected 'gpt' or 'function_call'",
        ),
        (
            {"conversations": [{"from": "system", "value": "a"}, HUMAN, GPT], "system": "b"},
            "'conversations'[0]: 'system' cannot follow 'system'",
        ),
        (
            {"conversations": [HUMAN, {"from": "observation", "value": "a"}, GPT]},
            "'conversations'[1]: 'observation' cannot follow 'human'",
        ),
        (
            {"conversations": [HUMAN, {"from": "function_call", "value": "{"}]},
            "'conversations'[1]: 'value' is not valid JSON: ",
        ),
        (
            {"conversations": [HUMAN, {"from": "function_call", "value": "[]"}]},
            "'conversations'[1]: 'value' must be a list of calls, not an empty one",
        ),
        (
            {"conversations": [HUMAN, {"from": "function_call", "value": "3"}]},
            "'conversations'[1]: 'value'[0] must be an object",
        ),
        (
            {"conversations": [HUMAN, {"from": "function_call", "value": CALL}]},
            "'conversations'[1]: 'value' must be a string, not an object",
        ),
        (
            {"conversations": [HUMAN, {"from": "function_call", "value": json.dumps(CALL)}, GPT]},
            "'conversations'[2]: 'gpt' cannot follow 'function_call'; expected 'observation'",
        ),
        # OpenAI
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "'messages'[1]: 'content' is empty"),
        ({"messages": [USER, {"role": "assistant"}]}, "'messages'[1]: 'content' must be a string, not null"),
        (
            {"messages": [USER, {"role": "developer", "content": "a"}]},
            "'messages'[1]: 'role' must be one of system, user, assistant, tool, not 'developer'",
        ),
        ({"messages": [USER, {"role": ["user"], "content": "a"}]}, "'messages'[1]: 'role' must be one of"),
        (
            {"messages": [USER, {**ANSWER, "weight": 0}]},
            "'messages'[1]: the key 'weight' is not supported: messages cannot be weighted",
        ),
        (
            {"messages": [USER, {**ANSWER, "function_call": CALL}]},
            "'messages'[1]: the key 'function_call' is not supported: use 'tool_calls'",
        ),
        (
            {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]},
            "'messages'[0]: 'content'[0] must be a part of type 'text' with its 'text', not 'image_url'",
        ),
        (
            {"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]},
            "'messages'[0]: only 'assistant' has 'tool_calls', not 'user'",
        ),
        ({"messages": [USER, {**CALLED, "content": 5}]}, "'messages'[1]: 'content' must be a string, not a number"),
        (
            {"messages": [USER, {**CALLED, "tool_calls": "x"}]},
            "'messages'[1]: 'tool_calls' must be a list of calls, not a string",
        ),
        (
            {"messages": [USER, {**CALLED, "tool_calls": [{"function": {"arguments": {}}}]}]},
            "'messages'[1]: 'tool_calls'[0] has no function 'name'",
        ),
        (
            {"messages": [USER, {**CALLED, "tool_calls": [{"name": "f"}]}]},
            "'messages'[1]: 'tool_calls'[0]: 'arguments' must be an object or the JSON text of one, not null",
        ),
        (
            {"messages": [USER, {**CALLED, "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "'messages'[1]: 'tool_calls'[0]: 'arguments' is not valid JSON: ",
        ),
        (
            {"messages": [USER, CALLED, USER]},
            "'messages'[2]: 'user' cannot follow 'assistant with tool_calls'; expected 'tool'",
        ),
        # tools
        ({"messages": [USER, ANSWER], "tools": "[{"}, "'tools' is not valid JSON: "),
        ({"messages": [USER, ANSWER], "tools": "{}"}, "'tools' must be a list or the JSON text of one, not an object"),
        ({"messages": [USER, ANSWER], "tools": 3}, "'tools' must be a list or the JSON text of one, not a number"),
        ({"messages": [USER, ANSWER], "tools": ["f"]}, "'tools'[0] must be an object, not a string"),
        ({"messages": [USER, ANSWER], "tools": [TOOL, {"parameters": {}}]}, "'tools'[1] has no function 'name'"),
    ],
)
def test_bad_conversation_is_rejected_with_line_and_key(value, reason):
    with pytest.raises(RecordError) as caught:
        read(value)
    assert str(caught.value).startswith("data.jsonl:7: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"instruction": "a", "output": "b"}, "no key 'chosen': a preference pair has 'chosen' and 'rejected'"),
        ({"instruction": "a", "chosen": "b"}, "no key 'rejected'"),
        ({"instruction": "a", "chosen": "b", "rejected": "b"}, "'chosen' and 'rejected' are equal"),
        ({"instruction": "a", "chosen": "b", "rejected": ""}, "'rejected' is empty"),
        ({"instruction": "a", "chosen": GPT, "rejected": "b"}, "'chosen' must be a string, not an object"),
        ({"conversations": [HUMAN], "chosen": "b", "rejected": "c"}, "'chosen' must be an object, not a string"),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": HUMAN}, "'rejected' must be from 'gpt', not from 'human'"),
        (
            {"conversations": [HUMAN, GPT], "chosen": GPT, "rejected": GPT},
            "'conversations'[1]: a prompt must end with 'human', not 'gpt'",
        ),
        (
            {"messages": [USER], "chosen": ANSWER, "rejected": {"role": "assistant", "content": None}},
            "'rejected': 'content' must be a string, not null",
        ),
        ({"messages": [], "chosen": ANSWER, "rejected": USER}, "'messages' is empty"),
        ({"prompt": "a", "chosen": [], "rejected": "b"}, "'chosen' must be one message, not a list of 0"),
        ({"chosen": [USER, ANSWER], "rejected": [SYSTEM, ANSWER]}, "conversations that must differ in the last message only"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "'chosen' and 'rejected' are equal"),
    ],
)
def test_bad_preference_is_rejected_with_line_and_key(value, reason):
    with pytest.raises(RecordError) as caught:
        read_pair(value)
    assert str(caught.value).startswith("data.jsonl:7: ")
    assert reason in str(caught.value)


# -- shipped samples and documentation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "read_it"), [("sft", parse_conversation), ("preference", parse_preference)])
def test_shipped_chat_samples_are_valid(name, read_it, tokenizer_folder):
    template = Tokenizer.from_pretrained(tokenizer_folder).chat_template
    records = list(read_file(str(ROOT / "recipes" / "samples" / f"{name}.jsonl")))
    assert 20 <= len(records) <= 50
    assert {key for record in records for key in FORMATS.keys() & record.value.keys()} == set(FORMATS)
    parsed = [read_it(record) for record in records]
    assert any(chat.tools for chat in parsed)
    for chat in parsed:
        if name == "sft":
            template.encode(chat.messages, chat.tools)
        else:
            for answer in (chat.chosen, chat.rejected):
                template.encode([*chat.prompt, answer], chat.tools, "last")


def test_records_in_the_documentation_are_valid():
    document = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    kinds = {"## Pretraining": text_of, "## Conversations": parse_conversation, "## Preferences": parse_preference}
    for heading, read_it in kinds.items():
        section = re.search(rf"^{heading}.*?(?=^## )", document, flags=re.DOTALL | re.MULTILINE)
        assert section, heading
        blocks = "\n".join(re.findall(r"```json\n(.*?)```", section[0], flags=re.DOTALL))
        values, at = [], 0
        while (at := len(blocks) - len(blocks[at:].lstrip())) < len(blocks):
            value, at = json.JSONDecoder().raw_decode(blocks, at)
            values.append(read_it(Record("docs/data.md", 1, value)))
        assert values
