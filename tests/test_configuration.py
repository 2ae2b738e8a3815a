"""docs/configuration.md is what the parser says now."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import callbacks
import datamodules
from bumblebee.cli import COMMANDS

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
