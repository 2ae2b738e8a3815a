"""A recipe names callbacks of ours and of the user's repository, from a wheel and an editable install, by every launcher."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from helpers.processes import ROOT

pytestmark = pytest.mark.slow

HELLO = """
from bumblebee import Callback

from .words import GREETING


class Hello(Callback):
    def on_fit_start(self, trainer):
        print(GREETING, flush=True)
"""
INSTALL = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]


@pytest.fixture(scope="module", params=["wheel", "editable"])
def environment(request, tmp_path_factory) -> Path:
    """The bin folder of an environment that holds Bumblebee alone and borrows its dependencies from this one."""
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "source"
    packages = ("bumblebee", "callbacks", "datamodules", "serve", "pyproject.toml", "README.md", "LICENSE")
    for name in packages:  # a copy, so that no build output is left in the checkout
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder.joinpath("source", name) if (ROOT / name).is_dir() else _made(source))
    builder = venv.EnvBuilder(with_pip=False, symlinks=True)
    builder.create(folder / "env")
    python = folder / "env" / "bin" / "python"
    site = sysconfig.get_path("purelib", "venv", {"base": str(folder / "env"), "platbase": str(folder / "env")})
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    editable = ["--editable"] if request.param == "editable" else []
    done = subprocess.run([python, *INSTALL, *editable, str(source)], capture_output=True, text=True, env=clean())
    assert done.returncode == 0, done.stderr
    return python.parent


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def clean() -> dict[str, str]:
    """The environment variables without what points at this checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A repository with folders of all three names, and a tokenizer and a recipe for a run of one step."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("callbacks", "datamodules", "serve"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    (folder / "callbacks" / "mine.py").write_text(HELLO)
    (folder / "callbacks" / "words.py").write_text("GREETING = 'hello from the user'\n")
    shutil.copy(ROOT / "recipes" / "samples" / "pretrain.jsonl", folder)
    words = ["tokenizer", "--files", "pretrain.jsonl", "--vocab_size", "300", "--output", "tokenizer"]
    env = {**clean(), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "bumblebee", *words], cwd=folder, env=env, check=True, capture_output=True)
    return folder


LAUNCHERS = {
    "console script": ["bumblebee"],
    "python -m": ["python", "-m", "bumblebee"],
    "torchrun": ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "bumblebee"],
    "deepspeed": ["python", "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--module", "bumblebee"],
}


def command(environment: Path, launcher: str, output: Path) -> list[str]:
    program, *rest = LAUNCHERS[launcher]
    shape = ["hidden_size=32", "intermediate_size=64", "num_hidden_layers=1", "num_attention_heads=2", "num_key_value_heads=2"]
    return [
        str(environment / program), *rest, "fit", "--config", str(ROOT / "recipes" / "pretrain.yaml"),
        "--task.model", str(ROOT / "recipes" / "models" / "tiny.yaml"),
        *[f"--task.model.config.{name.split('=')[0]}={name.split('=')[1]}" for name in shape],
        "--data.files", "pretrain.jsonl", "--data.tokenizer", "tokenizer", "--data.max_length", "64",
        "--trainer.max_steps", "1", "--callbacks.hello", "callbacks.mine.Hello", "--output_dir", str(output),
    ]  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_callbacks_of_both_sides_run(environment, launcher, repository, tmp_path):
    words = command(environment, launcher, tmp_path / "run")
    done = subprocess.run(words, cwd=repository, env={**clean(), "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hello from the user" in done.stdout  # theirs
    assert "RunSummary" in done.stdout and (tmp_path / "run" / "summary.json").is_file()  # ours


@pytest.mark.parametrize("launcher", ["console script", "python -m"])
def test_collisions_are_one_line(environment, launcher, repository, tmp_path):
    mine = tmp_path / "repository"
    shutil.copytree(repository, mine)
    (mine / "callbacks" / "checkpoint.py").touch()
    words = command(environment, launcher, tmp_path / "run")
    done = subprocess.run(words, cwd=mine, env=clean(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "the name callbacks.checkpoint is taken by Bumblebee: rename the module" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()
