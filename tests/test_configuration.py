"""docs/configuration.md matches the parsers, and the options named in docs/from_others.md exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import callbacks
import datamodules
from bumblebee.cli.commands import COMMANDS
from bumblebee.cli.main import main

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"


def test_configuration_page_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))["page"]()
    assert PAGE.read_text(encoding="utf-8") == page, "options have changed: run make docs"


@pytest.mark.parametrize(
    "name",
    [
        *(f"bumblebee {command}" for command in COMMANDS),
        *(f"callbacks.{name}" for name in callbacks.__all__),
        *(f"datamodules.{name}" for name in datamodules.__all__),
        *("bumblebee.optim.Cosine", "bumblebee.optim.ReduceOnPlateau", "bumblebee.optim.GroupRule"),
        *("bumblebee.LanguageModeling", "bumblebee.DPO", "bumblebee.Bumblebee", "bumblebee.Bumblebee.from_pretrained"),
        *("bumblebee.lora.LoRA", "bumblebee.transforms.ActivationCheckpointing", "bumblebee.transforms.Compile"),
    ],
)
def test_page_lists_every_command_and_shipped_class(name: str) -> None:
    assert f"# `{name}`\n" in PAGE.read_text(encoding="utf-8")


def recipe_of(option: str) -> str:
    """Return a recipe that accepts an option of docs/from_others.md; "" for options of other commands."""
    if option.startswith(("--task.model.config", "--task.model.attention", "--task.model ")):
        return "recipes/pretrain.yaml"
    if option.startswith("--task.") and not option.startswith(("--task.model", "--task.transforms")):
        return "recipes/dpo_lora.yaml"
    takes_recipe = "." in option.split()[0] or option.startswith(("--config", "--output_dir", "--schedule"))
    return "recipes/sft_lora.yaml" if takes_recipe else ""


def options_by_recipe() -> dict[str, list[str]]:
    """Group the options named in docs/from_others.md by the recipe that accepts them."""
    tables = (ROOT / "docs" / "from_others.md").read_text(encoding="utf-8")
    options: dict[str, list[str]] = {}
    for option in re.findall(r"`(--[^`]+)`", tables):
        options.setdefault(recipe_of(option), []).append(option)
    return options


@pytest.mark.parametrize("recipe", ["recipes/pretrain.yaml", "recipes/dpo_lora.yaml", "recipes/sft_lora.yaml"])
def test_recipe_accepts_the_options_of_from_others(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = [word for option in options_by_recipe()[recipe] for word in option.split()]
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", recipe, *words, "--print_config"])
    assert not done.value.code


def test_generate_chat_and_serve_accept_the_options_of_from_others() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))
    parsers = [page["parser_of"](command) for command in ("generate", "chat", "serve")]
    known = {action.dest for parser in parsers for action in page["options"](parser)}
    named = {option.split()[0].removeprefix("--") for option in options_by_recipe()[""]}
    assert {"model", "temperature", "system_prompt", "enable_history", "host"} <= named <= known
