"""``bumblebee sweep`` on real training runs, by the commands of docs/sweeps.md: killed, resumed, the best trained again."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers.documents import ROOT, SWEEPS, commands, shell_environment
from helpers.fake_sweeps import FAKE_TRIAL

from bumblebee.cli.commands.sweep import check_metric, check_parameters, measure, parser
from bumblebee.cli.main import main
from bumblebee.cli.recipe_options import recipe_command_parser
from bumblebee.recipe import dump
from bumblebee.sweep.ladder.rungs import resolve
from bumblebee.sweep.recipe import SweepRecipe
from bumblebee.sweep.sweep_file import SweepFile
from bumblebee.sweep.sweep_options import SweepOptions
from bumblebee.sweep.trials.devices import Devices
from bumblebee.sweep.trials.trial import Trial

SMALL = """\
class_path: bumblebee.Bumblebee
init_args:
  config:
    {vocab_size: 400, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
"""
CHEAP = (
    "--task.model small.yaml --trainer.max_steps 6 --trainer.micro_batch_size 1 --trainer.precision fp32 --trainer.device cpu"
    " --data.max_length 32 --callbacks.validation.every 3 --callbacks.checkpoint.every 2 --callbacks.tensorboard null"
    " --callbacks.plot null"
)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(command: str, folder: Path, extra: str = "") -> subprocess.Popen[str]:
    words = [sys.executable, "-m", *shlex.split(command), *extra.split()]
    return subprocess.Popen(
        words, cwd=folder, env=shell_environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture
def workplace(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A folder with recipes, documentation, a tokenizer and a small model."""
    for name in ("recipes", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copytree(tokenizer_folder, tmp_path / "runs" / "tokenizer")
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_sweep_goes_on_and_its_best_recipe_reproduces(workplace: Path) -> None:
    first, resumed, best = commands(SWEEPS)[:3]
    sweep, trial = workplace / "runs" / "search" / "sweep", workplace / "runs" / "search" / "sweep" / "trial-0000"
    killed = run(first, workplace, f"{CHEAP} --count 1")
    deadline = time.monotonic() + 200
    while not list(trial.glob("checkpoint-*")) and time.monotonic() < deadline:
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.05)
    os.killpg(int((trial / ".sweep_process").read_text()), signal.SIGKILL)
    killed.kill()
    killed.wait()
    going_on = run(resumed, workplace, f"{CHEAP} --count 1")
    printed = going_on.communicate(timeout=300)[0]
    assert going_on.returncode == 0, printed
    assert "trial-0000 resumed: optimizer.lr" in printed and "best of 1 trial: trial-0000 with validation_loss" in printed
    assert "resum" in (trial / "output.txt").read_text()
    again = run(best, workplace)
    output = again.communicate(timeout=200)[0]
    assert again.returncode == 0, output
    losses = [
        [(line["step"], line.get("loss", line.get("validation_loss"))) for line in metrics(f)] for f in (trial, sweep.parent)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    recipes = [yaml.safe_load(file.read_text()) for file in (sweep / "best.yaml", trial / "recipe.yaml")]
    assert recipes[0]["output_dir"] == "runs/search" and recipes[0]["optimizer"] == recipes[1]["optimizer"]
    assert (sweep / "history.png").is_file() and (sweep / "curves.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("command", commands(SWEEPS)[3:])
def test_documented_command_runs_trials(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the training runs, and fewer of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "runs").mkdir()
    seen = []

    def fake(recipe: SweepRecipe, base: Path, trial: Trial, folder: Path, devices: Devices) -> list[str]:
        seen.append((devices, recipe.words(base, trial.values)))
        return [sys.executable, "-S", "-E", str(FAKE_TRIAL), str(folder), "1", "2", "0"]

    monkeypatch.setattr(SweepRecipe, "command", fake)
    words = shlex.split(command)[1:]
    if "dpo" in command:
        space = (ROOT / "recipes" / "sweeps" / "dpo.yaml").read_text().replace("rewards/accuracies", "loss")
        (tmp_path / "dpo.yaml").write_text(space)  # the stand-ins log a loss
        words[words.index("recipes/sweeps/dpo.yaml")] = "dpo.yaml"
    main([*words, "--count", "3", "--callbacks.validation", "callbacks.Validation"])
    assert len(seen) == 3 and all(Path(words[1]).is_file() for _, words in seen)
    assert {len(devices) for devices, _ in seen} == {2 if "[[" in command else 1 if "[" in command else 0}


@pytest.mark.slow
@pytest.mark.parametrize("space", sorted((ROOT / "recipes" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_search_space_fits_its_recipe(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    head = [line for line in space.read_text().splitlines() if line.startswith("#")]
    command = next(line[1:].split() for line in head if "bumblebee sweep" in line)
    assert command[command.index("--sweep") + 1] == str(space.relative_to(ROOT))
    file, recipe = SweepFile.read(str(space)), SweepRecipe(dump(parser().parse(command[2:])))
    check_metric(file, recipe)
    if file.ladder:
        options = SweepOptions(sweep=str(space), devices=[[0, 1]])
        file, ladder = resolve(file, file.ladder, lambda size: measure(file, recipe, size, options))
        assert ladder.trained[-1].parameters == 4_740_352 and ladder.predicted[0].parameters > 1.5 * 4_740_352
        assert ladder.trained[0].tokens == ladder.trained[0].steps * 1024 * 4 * 8 * 2
    check_parameters(file, recipe)


@pytest.mark.slow
def test_values_of_every_kind_reach_the_trials_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    recipe = SweepRecipe(dump(parser().parse(["--config", "recipes/sft_lora.yaml", "--sweep", "-"])), "project")
    (tmp_path / "base.yaml").write_text(recipe.text)
    values = {
        "optimizer.lr": 1e-5, "optimizer.betas": [0.9, 0.99], "task.transforms.rank": 8, "schedule": "bumblebee.optim.Linear",
        "config": "recipes/memory/activations.yaml", "options": {"seed": 7, "trainer.gradient_clip": None},
    }  # fmt: skip
    command = recipe.command(tmp_path / "base.yaml", Trial(3, "running", values), tmp_path / "trial", (0, 1))
    assert command[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    cfg = recipe_command_parser("fit").parse(command[command.index("fit") + 1 :])
    assert (cfg.optimizer.init_args.lr, cfg.optimizer.init_args.betas, cfg.seed) == (1e-5, (0.9, 0.99), 7)
    classes = [transform.class_path for transform in cfg.task.init_args.transforms]
    assert classes == ["bumblebee.transforms.ActivationCheckpointing", "bumblebee.lora.LoRA"]
    assert cfg.task.init_args.transforms[-1].init_args.rank == 8 and cfg.schedule.class_path == "bumblebee.optim.Linear"
    assert cfg.trainer.gradient_clip is None and cfg.trainer.resume == "auto" and cfg.output_dir == str(tmp_path / "trial")
    assert vars(cfg.callbacks["wandb"].init_args).items() >= {"project": "project", "name": "trial-0003"}.items()
