"""Every recipe that a person copies: it parses, begins with its launch line, and the samples it points at are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from bumblebee.cli import main
from bumblebee.config import PRESETS, BumblebeeConfig

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "models")
OVERLAYS = [path for path in RECIPES if path.parent.name in ("memory", "speed")]  # go behind another recipe
MODELS = sorted((ROOT / "recipes" / "models").glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def resolved(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What ``--print_config`` prints."""
    with pytest.raises(SystemExit) as done:
        main([*command, "--print_config"])
    assert not done.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_and_its_resolved_form_is_the_same(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [recipe.stem, "--model", "folder"] if recipe.stem in ("chat", "serve") else ["fit"]
    below = ["--config", "recipes/pretrain.yaml"] if recipe in OVERLAYS else []
    once = resolved([*command, *below, "--config", str(recipe)], capsys)
    saved = tmp_path / "resolved.yaml"
    saved.write_text(once)
    assert resolved([*command, "--config", str(saved)], capsys) == once


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_begins_with_what_it_does_and_how_to_launch_it(recipe: Path) -> None:
    head = recipe.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"--config {recipe.relative_to(ROOT)}" in head


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_files_in_a_recipe_are_there(recipe: Path) -> None:
    for path in re.findall(r"recipes/samples/[\w./]+", recipe.read_text()):
        assert (ROOT / path).is_file()


def test_every_published_size_has_a_recipe() -> None:
    assert {path.stem for path in MODELS} == set(PRESETS)


@pytest.mark.parametrize("recipe", MODELS, ids=lambda path: path.stem)
def test_model_recipe_is_the_preset(recipe: Path) -> None:
    described = yaml.safe_load(recipe.read_text())["init_args"]["config"]
    assert BumblebeeConfig(**described) == BumblebeeConfig.preset(recipe.stem)


@pytest.mark.parametrize("size", [path.stem for path in MODELS])
def test_a_size_is_one_option(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    once = resolved(["fit", "--config", "recipes/pretrain.yaml", "--task.model", f"recipes/models/{size}.yaml"], capsys)
    config = yaml.safe_load(once)["task"]["init_args"]["model"]["init_args"]["config"]
    assert config["hidden_size"] == PRESETS[size]["hidden_size"]
