"""Tool calls are parsed as the template rendered them, for any chunk boundaries."""

from __future__ import annotations

import json

import pytest
from helpers import chat_folders
from helpers.tool_call_templates import NO_TEXT, ONE_CALL, TEMPLATES, tokenizer_of
from hypothesis import given
from hypothesis import strategies as st

from bumblebee.inference.detokenizer import Detokenizer
from bumblebee.tokenizer.tokenizer import Tokenizer
from bumblebee.tokenizer.tool_call_format import ToolCallFormat
from bumblebee.tokenizer.tool_call_parser import ParsedCall, ToolCallParser

NAMES = ["fly", "fly_home", "look-up"]
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in NAMES]

# Characters of the markers, and those that JSON escapes.
nasty = st.text(st.sampled_from(list('{}[]"\\<>/\n `aé花🐝\u2028')), max_size=12) | st.sampled_from(
    ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", '{"name": "fly"}', "\\u007d", "<|eot|>", "<|im_end|>", "[/CALLS]"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | nasty,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(nasty, inner, max_size=3),
    max_leaves=6,
)
calls = st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(nasty, values, max_size=3)), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calling")
    return {name: tokenizer_of(name, folder / name) for name in TEMPLATES}


@pytest.fixture(scope="module")
def formats(tokenizers):
    return {name: ToolCallFormat.detect(tokenizer) for name, tokenizer in tokenizers.items()}


def answer_of(tokenizer, rewrite, said, called):
    """The ids that a model generates for a text and calls."""
    written = [
        {"id": f"bumblebe{at}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for at, (name, arguments) in enumerate(called)
    ]
    question = {"role": "user", "content": "?"}
    answer = {"role": "assistant", "content": said, "tool_calls": written}
    prompt = tokenizer.chat_template.apply(rewrite([question]), TOOLS, True)
    whole = tokenizer.chat_template.apply(rewrite([question, answer]), TOOLS)
    assert whole[: len(prompt)] == prompt
    return whole[len(prompt) :]


def parsed(format, pieces, names=NAMES):
    parser = ToolCallParser(format, names)
    parts = [part for piece in pieces for part in parser.feed(piece)] + parser.finish()
    said = "".join(part for part in parts if isinstance(part, str))
    return said, [(part.name, json.loads(part.arguments)) for part in parts if isinstance(part, ParsedCall)]


@pytest.mark.parametrize("name", TEMPLATES)
@given(said=nasty, called=calls)
def test_rendered_calls_are_parsed_token_by_token(tokenizers, formats, name, said, called):
    tokenizer, format = tokenizers[name], formats[name]
    said = "" if name in NO_TEXT else said.strip()
    if '{"name"' in said:
        said = ""  # this would be a call in a format without markers
    called = called[:1] if name in ONE_CALL else called
    detokenizer = Detokenizer(tokenizer, (), format.marker_ids)
    ids = answer_of(tokenizer, format.rewrite, said, called)
    pieces = [detokenizer.add(index) for index in ids] + [detokenizer.finish()]
    found, made = parsed(format, pieces)
    assert made == called
    assert found.removeprefix("<think>\n\n</think>").strip() == said


ANSWERS = [
    'Hello <tool_call>\n{"name": "fly", "arguments": {"to": "}<"}}\n</tool_call>\n<tool_call>{"name": "fly"}</tool_call> Bye ',
    '<tool_call>{"name": "fly", "arguments": {"a": "\\\\"}} and <tool_call>{"name": "fly"}',
    '<tool_call>{"name": "crawl"}</tool_call> <tool_call> no',
    '[TOOL_CALLS] [{"name": "fly", "arguments": {}}, {"name": "look-up", "arguments": {"x": [1, {}]}}] x',
    '[TOOL_CALLS]fly[ARGS]{"a": 1}[TOOL_CALLS]fly_home[ARGS]{} ]',
    '{"name": "fly", "parameters": {}}',
    "fly\n{} fly",
    "fly_home now",
    '<tool_call>{"name": "fly"}</tool_call><tool_call>{"name": "no"}</tool_call><tool_call>{"name": "fly"}</tool_call>',
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", ANSWERS)
@given(cuts=st.lists(st.integers(0, 120), max_size=12))
def test_chunk_boundaries_do_not_matter(formats, name, answer, cuts):
    places = [0, *sorted(cuts), len(answer)]
    pieces = [answer[begin:end] for begin, end in zip(places, places[1:], strict=False)]
    assert "".join(pieces) == answer or max(cuts) > len(answer)
    assert parsed(formats[name], pieces) == parsed(formats[name], [answer])


@pytest.mark.parametrize(
    "answer",
    [
        "<tool_call>fly</tool_call>",
        '<tool_call>{"name": "crawl", "arguments": {}}</tool_call>',
        '<tool_call>{"name": 5}</tool_call>',
        '<tool_call>{"name": "fly", "arguments": "far"}</tool_call>',
        '<tool_call>{"name": "fly", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "fly", "arguments": {"x": 1e999}}</tool_call>',
        '<tool_call>{"name": "fly", arguments: {}}</tool_call>',
        '<tool_call>{"name": "fly", "arguments": {"x": ',
        '<tool_call>{"a": ' + '{"a": ' * 100_000 + "1" + "}" * 100_001,
        "if a < b: <tool",
        "Blanks stay  \n\n",
    ],
)
def test_non_calls_stay_text(formats, answer):
    assert parsed(formats["chatml"], [answer]) == (answer, [])


def test_call_after_a_non_call_is_parsed(formats):
    answer = '<tool_call>oh</tool_call> <tool_call>{"name": "fly", "arguments": {}}</tool_call>'
    assert parsed(formats["chatml"], answer) == ("<tool_call>oh</tool_call>", [("fly", {})])


def test_unknown_tool_between_two_calls_is_text(formats):
    made = '<tool_call>{"name": "fly", "arguments": {"a": "}"}}</tool_call>'
    none = made.replace("fly", "crawl")
    assert parsed(formats["chatml"], [made + none + made]) == (none, [("fly", {"a": "}"})] * 2)


def test_json_answer_is_not_buffered_if_calls_start_with_names(formats):
    assert ToolCallParser(formats["glm"], NAMES).feed('{"a": ') == ['{"a":']


def test_text_is_returned_at_once_and_calls_when_complete(formats):
    parser = ToolCallParser(formats["chatml"], NAMES)
    fed = ["A <b> ", "c", " <tool", '_call>{"name": "fly"', ', "arguments": {"n": 1.50}}', "</tool_call>", "\n"]
    given_out = [parser.feed(piece) for piece in fed]
    assert given_out == [["A <b>"], [" c"], [], [], [ParsedCall("fly", '{"n": 1.5}')], [], []]
    assert parser.finish() == []


def test_line_breaks_and_surrogates_in_strings(formats):
    answer = '<tool_call>{"name": "fly", "arguments": {"a": "b\nc", "d": "\\ud800"}}</tool_call>'
    assert parsed(formats["chatml"], [answer]) == ("", [("fly", {"a": "b\nc", "d": "\ufffd"})])


def test_unmarked_object_later_in_the_answer_is_text(formats):
    answer = 'So: {"name": "fly", "parameters": {}}'
    assert parsed(formats["llama"], [answer]) == (answer, [])


def test_template_without_calls_has_no_format(tmp_path):
    plain = Tokenizer.from_pretrained(chat_folders.write(tmp_path, chat_folders.byte_level(), chat_folders.LLAMA))
    assert ToolCallFormat.detect(plain) is None
