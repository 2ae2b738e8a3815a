"""Shipped recipes parse, begin with their launch command and refer to existing files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import questions
import stdlib_docs
import yaml
from jsonargparse import Namespace
from make_data import SUBJECTS

from bumblebee.cli.main import main
from bumblebee.cli.recipe_options import recipe_command_parser
from bumblebee.config import PRESETS, BumblebeeConfig

ROOT = Path(__file__).parents[2]
NOT_RECIPES = ("models", "sweeps", "evaluation")  # tests/system/test_sweep_command.py checks the search spaces
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name not in NOT_RECIPES)
OVERLAYS = [path for path in RECIPES if path.parent.name in ("memory", "speed")]  # added to another recipe
MODELS = sorted((ROOT / "recipes" / "models").glob("*.yaml"))


def model_of(recipe: Path) -> dict[str, Any]:
    """Return a recipe's model, read from the file that the recipe names if it names one; {} without a task."""
    model = (yaml.safe_load(recipe.read_text()).get("task") or {}).get("init_args", {}).get("model") or {}
    return yaml.safe_load((recipe.parent / model).read_text()) if isinstance(model, str) else model


BUILDERS = [path for path in RECIPES if model_of(path).get("class_path") == "bumblebee.Bumblebee"]


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def resolved(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what ``--print_config`` prints."""
    with pytest.raises(SystemExit) as done:
        main([*command, "--print_config"])
    assert not done.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_resolved_recipe_is_the_same_config(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [recipe.stem, "--model", "folder"] if recipe.stem in ("chat", "serve") else ["fit"]
    below = ["--config", "recipes/pretrain.yaml"] if recipe in OVERLAYS else []
    once = resolved([*command, *below, "--config", str(recipe)], capsys)
    saved = tmp_path / "resolved.yaml"
    saved.write_text(once)
    assert resolved([*command, "--config", str(saved)], capsys) == once


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_begins_with_its_launch_command(recipe: Path) -> None:
    head = recipe.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"--config {recipe.relative_to(ROOT)}" in head


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_files_of_a_recipe_exist(recipe: Path) -> None:
    for path in re.findall(r"recipes/samples/[\w./]+", recipe.read_text()):
        assert (ROOT / path).is_file()


@pytest.mark.slow
def test_quickstart_suggests_questions_it_was_trained_on() -> None:
    serve = yaml.safe_load((ROOT / "recipes" / "quickstart" / "serve.yaml").read_text())
    taught = {subject.name for subject in questions.select(questions.askable(stdlib_docs.entries()), SUBJECTS)}
    suggested = {re.findall("`(.+)`", question)[0] for question in serve["examples"]}
    assert suggested <= taught and len(suggested) >= 3


def test_every_preset_has_a_model_recipe() -> None:
    assert {path.stem for path in MODELS} == set(PRESETS)


@pytest.mark.parametrize("recipe", MODELS, ids=lambda path: path.stem)
def test_model_recipe_matches_the_preset(recipe: Path) -> None:
    described = yaml.safe_load(recipe.read_text())["init_args"]["config"]
    assert BumblebeeConfig(**described) == BumblebeeConfig.preset(recipe.stem)


@pytest.mark.parametrize("size", [path.stem for path in MODELS])
def test_model_recipe_is_selected_by_one_option(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    once = resolved(["fit", "--config", "recipes/pretrain.yaml", "--task.model", f"recipes/models/{size}.yaml"], capsys)
    config = yaml.safe_load(once)["task"]["init_args"]["model"]["init_args"]["config"]
    assert config["hidden_size"] == PRESETS[size]["hidden_size"]


def test_recipes_that_build_a_model_are_found() -> None:
    assert {"pretrain.yaml", "quickstart/pretrain.yaml"} <= {str(path.relative_to(ROOT / "recipes")) for path in BUILDERS}


@pytest.mark.parametrize("recipe", BUILDERS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_model_option_is_a_flag(recipe: Path) -> None:
    shape = {
        "num_hidden_layers": 6, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 96,
        "rope_theta": 5e4, "tie_word_embeddings": False, "qk_norm": True,
    }  # fmt: skip
    flags = [word for name, value in shape.items() for word in (f"--task.model.config.{name}", str(value).lower())]
    parser = recipe_command_parser("fit")
    cfg = parser.parse(["--config", str(recipe), *flags, "--output_dir", "runs/a"])
    model = parser.instantiate(Namespace(task=cfg.task)).task.model
    assert {name: getattr(model.config, name) for name in shape} == shape and cfg.output_dir == "runs/a"
    assert len(model.model.layers) == 6 and model.model.layers[0].mlp.up_proj.weight.shape == (96, 64)
