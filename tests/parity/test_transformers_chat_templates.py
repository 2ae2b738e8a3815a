"""Chat templates give the same text, ids and mask as in transformers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.chat_folders import LLAMA, MISTRAL, QWEN, TAGGED, THINKING, byte_level, sentencepiece, write
from hypothesis import given, settings
from hypothesis import strategies as st

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoTokenizer  # noqa: E402

from bumblebee import Tokenizer  # noqa: E402
from bumblebee.tokenizer.chatml import CHATML  # noqa: E402

BACKENDS = {
    "bytes": byte_level(),
    "greedy": byte_level(rstrip=True, lstrip=True),
    "first": sentencepiece("first"),
    "always": sentencepiece("always"),
    "normalizer": sentencepiece("normalizer"),
}
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL, "qwen": QWEN, "thinking": THINKING, "tagged": TAGGED}
WORDS = [
    "bumblebee",
    " isn't",
    "  ",
    "\n\n",
    "2024",
    "花",
    "🐝",
    "é",
    "</think>",
    "[INST]",
    "<",
    "{{ x }}",
    "<|im_",
    "\x1f",
    "\u2003",
]
TEXTS = st.lists(st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=5).map(
    "".join
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": [1, 2.5], "b": "<é>&'"}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds <é> & 'more'", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    for backend in BACKENDS:
        for name, template in TEMPLATES.items():
            write(root / backend / name, BACKENDS[backend], template)
    return root


def both(folder: Path):
    return Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_text_and_ids_equal_transformers(folders, backend, template):
    ours, hf = both(folders / backend / template)

    @settings(deadline=None, max_examples=25)
    @given(st.lists(TEXTS, min_size=1, max_size=5), st.booleans())
    def check(texts, prompt):
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        expected = hf.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
        assert ours.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False) == expected
        ids = hf.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == ids

    check()


@pytest.mark.parametrize("template", ["chatml", "qwen"])
@pytest.mark.parametrize("content", [None, "", "One moment."])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_tools_and_calls_equal_transformers(folders, template, content, system):
    ours, hf = both(folders / "bytes" / template)
    call = {"role": "assistant", "content": content, "tool_calls": [CALL, CALL]}
    results = [{"role": "tool", "content": "3.5"}, {"role": "tool", "content": "4"}]
    messages = [*system, {"role": "user", "content": "Add."}, call, *results, {"role": "assistant", "content": "Done."}]
    for tools in ([TOOL, TOOL], None):
        expected = hf.apply_chat_template(messages, tools=tools, tokenize=False)
        assert ours.apply_chat_template(messages, tools=tools, tokenize=False) == expected
        assert ours.apply_chat_template(messages, tools) == hf.apply_chat_template(messages, tools=tools, return_dict=False)


def test_assistant_mask_equals_transformers(folders):
    ours, hf = both(folders / "bytes" / "tagged")

    @settings(deadline=None, max_examples=50)
    @given(st.lists(TEXTS.filter(lambda text: text == text.strip()), min_size=2, max_size=6))
    def check(texts):
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        expected = hf.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        actual = ours.chat_template.encode(messages)
        assert (actual.ids, list(map(int, actual.target_mask))) == (expected["input_ids"], expected["assistant_masks"])

    check()


def test_tool_use_template_is_selected_as_in_transformers(tmp_path):
    named = [{"name": "default", "template": LLAMA}, {"name": "tool_use", "template": QWEN}]
    ours, hf = both(write(tmp_path, BACKENDS["bytes"], named))
    messages = [{"role": "user", "content": "Add."}]
    for tools in (None, [TOOL]):
        assert ours.apply_chat_template(messages, tools) == hf.apply_chat_template(messages, tools=tools, return_dict=False)


@pytest.mark.parametrize("given_as", ["settings", "jinja", "json", "default"])
def test_saved_template_works_in_transformers(tmp_path, given_as):
    folder = write(tmp_path / "old", BACKENDS["bytes"], QWEN if given_as == "settings" else None)
    if given_as == "jinja":
        (folder / "chat_template.jinja").write_text(QWEN)
    if given_as == "json":
        import json

        (folder / "chat_template.json").write_text(json.dumps({"chat_template": QWEN}))
    Tokenizer.from_pretrained(folder).save_pretrained(tmp_path / "new")
    ours, hf = both(tmp_path / "new")
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    assert ours.apply_chat_template(messages, [TOOL]) == hf.apply_chat_template(messages, tools=[TOOL], return_dict=False)
    assert ours.chat_template.sources == {"default": CHATML if given_as == "default" else QWEN}
