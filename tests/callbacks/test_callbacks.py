"""Properties of all callbacks: cheap imports, use in recipes, no output on ranks other than 0."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.stub_engine import StubData, StubTrainer
from jsonargparse import ArgumentParser

import callbacks
from bumblebee.callback import Callback

ROOT = Path(__file__).parents[2]
NAMES = callbacks.__all__
NEED_A_MODEL = ("BigramBaseline", "Evaluate", "RunSummary", "Samples", "WandB")
REQUIRED = {  # arguments without a default
    "Evaluate": {"tasks": {"texts": {"class_path": "bumblebee.evaluation.tasks.Perplexity"}}},
    "Samples": {"prompts": ["Once"]},
    "WandB": {"project": "bees", "offline": True},
}


def build(name: str) -> Callback:
    return getattr(callbacks, name)(**REQUIRED.get(name, {}))


def test_importing_callbacks_does_not_import_heavy_packages():
    code = (
        f"import sys, callbacks; [getattr(callbacks, name) for name in {NAMES}];"
        "heavy = ('torch', 'matplotlib', 'tensorboard', 'tqdm', 'numpy', 'deepspeed', 'wandb');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_importing_the_package_does_not_import_its_modules():
    code = "import sys, callbacks; print([name for name in sys.modules if name.startswith('callbacks.')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Chekpoint'"):
        callbacks.Chekpoint  # noqa: B018


@pytest.mark.parametrize("name", NAMES)
def test_recipe_builds_callback_by_class_path(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=dict[str, Callback | None])
    recipe = {"class_path": f"callbacks.{name}", "init_args": REQUIRED.get(name, {})}
    options = parser.parse_args([f"--callbacks={json.dumps({'one': recipe})}"])
    assert type(parser.instantiate(options).callbacks["one"]) is getattr(callbacks, name)


def test_command_line_option_overrides_callback_option():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=dict[str, Callback | None])
    recipe = {"checkpoint": {"class_path": "callbacks.Checkpoint", "init_args": {"every": 500, "keep": 5}}}
    options = parser.parse_args([f"--callbacks={json.dumps(recipe)}", "--callbacks.checkpoint.every=7"])
    checkpoint = parser.instantiate(options).callbacks["checkpoint"]
    assert (checkpoint.every, checkpoint.keep) == (7, 5)


# Evaluate and Samples: see test_callbacks_on_two_ranks.py.
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("Evaluate", "Samples")])
def test_other_ranks_write_and_print_nothing(name, stub_trainer, tmp_path, capsys, monkeypatch):
    if name == "WandB":
        pytest.importorskip("wandb")
    trainer = stub_trainer([build(name)], data=StubData(tokenizer=object()))
    monkeypatch.setattr(StubTrainer, "is_main", False)
    trainer.save_checkpoint = lambda last=False, model=True: None  # collective; rank 0 writes
    trainer.save_model = lambda folder: None
    trainer.run()
    trainer.validate()
    trainer.call("on_exception", RuntimeError("no"))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Evaluate"])  # whose check needs real data
def test_exception_before_start_is_handled(name, stub_trainer, tmp_path):
    if name == "WandB":
        pytest.importorskip("wandb")
    trainer = stub_trainer([build(name)], data=StubData(tokenizer=object()))
    trainer.call("on_exception", ValueError("raised by another callback's on_fit_start"))


@pytest.mark.parametrize("name", NAMES)
def test_state_is_json(name, stub_trainer):
    callback = build(name)
    if name not in NEED_A_MODEL:
        stub_trainer([callback]).run()
    state = callback.state_dict()
    assert json.loads(json.dumps(state, allow_nan=False)) == state
