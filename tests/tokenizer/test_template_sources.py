"""Where chat templates come from: settings, files of the folder, or ChatML, and errors that name the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from helpers.chat_folders import LLAMA, QWEN, byte_level

from bumblebee import Tokenizer
from bumblebee.tokenizer.chatml import CHATML


@pytest.mark.parametrize(
    "setting", [3, ["x"], [{"name": "default"}], [{"name": "default", "template": None}], {"default": "x"}]
)
def test_invalid_chat_template_setting_is_rejected(setting):
    tokenizer = Tokenizer(byte_level(), {"chat_template": setting}, "FOLDER")
    with pytest.raises(ValueError, match=r"^FOLDER: chat_template must be a string or a list of \{name, template\}$"):
        tokenizer.chat_template  # noqa: B018


def test_missing_template_and_chatml_tokens_are_reported():
    plain = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()), {}, "FOLDER")
    with pytest.raises(ValueError, match=r"FOLDER has no chat template, .* <\|im_start\|> and <\|im_end\|>"):
        plain.chat_template  # noqa: B018


def test_template_file_that_is_not_utf8_is_named(tokenizer_folder, tmp_path: Path):
    Tokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="chat_template.jinja: .*utf-8"):
        Tokenizer.from_pretrained(tmp_path)


def test_trained_tokenizer_has_the_default_template(tokenizer_folder):
    assert json.loads((tokenizer_folder / "tokenizer_config.json").read_text())["chat_template"] == CHATML


def test_named_templates_are_read_from_files(tokenizer_folder, tmp_path: Path):
    Tokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(LLAMA)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(QWEN)
    assert Tokenizer.from_pretrained(tmp_path).chat_template.sources == {"default": LLAMA, "tool_use": QWEN}
