"""The words of the command line are rewritten into the form that jsonargparse accepts."""

from __future__ import annotations

import re

import pytest

from bumblebee.cli.argv import ListOption, fold


@pytest.mark.parametrize(
    ("words", "folded", "flags"),
    [
        ("--overwrite", "--overwrite=true", ["overwrite"]),
        ("--no_overwrite", "--overwrite=false", ["overwrite"]),
        ("--overwrite false", "--overwrite false", []),
        ("--data.files a b", '--data.files=["a", "b"]', []),
        ('--data.files a {"path":"x","weight":2}', '--data.files=["a", {"path": "x", "weight": 2}]', []),
        ("--data.files a {b", '--data.files=["a", "{b"]', []),
        ("--data.files a", "--data.files a", []),
        ("--a 1 --config x --b=2", "--config x --a 1 --b=2", []),
        ("--config x y", "--config x --config y", []),
        ("--config=x --a 1 --config y", "--config=x --config y --a 1", []),
        ("--callbacks.stop a", "--callbacks.stop a", []),
        ("--trainer.epochs -1", "--trainer.epochs -1", []),
        ("--help", "--help", []),
        ("--print_config", "--print_config", []),
    ],
)
def test_words_are_rewritten_for_jsonargparse(words, folded, flags):
    assert fold(words.split()) == (re.findall(r"\S+=\[.*\]|\S+", folded), flags)


@pytest.mark.parametrize(
    ("words", "folded"),
    [
        (["--stop", "[INST]"], '--stop=["[INST]"]'),
        (["--stop", '["a", "b"]'], '--stop=["a", "b"]'),
        (["--stop", "a", "b"], '--stop=["a", "b"]'),
        (["--examples", "[How are you?, Who are you?]"], "--examples=[How are you?, Who are you?]"),
        (["--examples", "How are you?"], '--examples=["How are you?"]'),
    ],
)
def test_one_value_of_a_list_option_is_a_list(words, folded):
    lists = {name: ListOption(str, always=True) for name in ("--stop", "--examples")}
    assert fold(words, lists) == ([folded], [])
