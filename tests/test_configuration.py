"""docs/configuration.md is what the parser says now."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import callbacks
import datamodules
from bumblebee.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"


def test_the_page_of_options_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))["page"]()
    assert PAGE.read_text(encoding="utf-8") == made, "options have changed: run make docs"


@pytest.mark.parametrize(
    "name",
    [
        *(f"bumblebee {command}" for command in COMMANDS),
        *(f"callbacks.{name}" for name in callbacks.__all__),
        *(f"datamodules.{name}" for name in datamodules.__all__),
        *("bumblebee.optim.Cosine", "bumblebee.optim.ReduceOnPlateau"),
        *("bumblebee.lora.LoRA", "bumblebee.transforms.ActivationCheckpointing", "bumblebee.transforms.Compile"),
    ],
)
def test_every_command_and_every_shipped_class_is_on_it(name: str) -> None:
    assert f"# `{name}`\n" in PAGE.read_text(encoding="utf-8")


def recipe_of(option: str) -> str:
    """The recipe that has the part that an option of docs/from_others.md speaks of; nothing where no recipe has it."""
    if option.startswith(("--task.model.config", "--task.model.attention", "--task.model ")):
        return "recipes/pretrain.yaml"
    if option.startswith("--task.") and not option.startswith(("--task.model", "--task.transforms")):
        return "recipes/dpo_lora.yaml"
    return (
        "recipes/sft_lora.yaml"
        if "." in option.split()[0] or option.startswith(("--config", "--output_dir", "--schedule"))
        else ""
    )


def options_for_others() -> dict[str, list[str]]:
    """The options of ours that the tables name, by the recipe that takes them."""
    tables = (ROOT / "docs" / "from_others.md").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for option in re.findall(r"`(--[^`]+)`", tables):
        found.setdefault(recipe_of(option), []).append(option)
    return found


@pytest.mark.parametrize("recipe", ["recipes/pretrain.yaml", "recipes/dpo_lora.yaml", "recipes/sft_lora.yaml"])
def test_a_recipe_takes_what_is_said_to_those_who_come_from_others(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = [word for option in options_for_others()[recipe] for word in option.split()]
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", recipe, *words, "--print_config"])
    assert not done.value.code


def test_generate_chat_and_serve_take_what_is_said_to_those_who_come_from_others() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))
    parsers = [made["parser_of"](command) for command in ("generate", "chat", "serve")]
    known = {action.dest for parser in parsers for action in made["options"](parser)}
    named = {option.split()[0].removeprefix("--") for option in options_for_others()[""]}
    assert {"model", "temperature", "system_prompt", "enable_history", "host"} <= named <= known
