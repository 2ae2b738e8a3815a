"""The recipes of DPO, ORPO, KTO and reward models as whole commands: fit and validate; user errors are one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers.processes import run_command
from helpers.training_runs import small_model

from bumblebee.cli.main import main

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["--trainer.precision", "fp32", "--trainer.max_steps", "3", "--optimizer.lr", "1e-3", "--callbacks.tensorboard=null"]


@pytest.fixture(scope="module")
def workspace(tokenizer_folder, tmp_path_factory):
    """A folder with the recipes, a tokenizer and the SFT model that they start from."""
    folder = tmp_path_factory.mktemp("dpo")
    shutil.copytree(RECIPES, folder / "recipes")
    shutil.copytree(tokenizer_folder, folder / "runs" / "sft")
    small_model(vocab_size=400, max_position_embeddings=1024).save_pretrained(folder / "runs" / "sft")
    return folder


@pytest.mark.parametrize(("recipe", "stage"), [("dpo_full", "2"), ("dpo_full", "3"), ("dpo_lora", "2"), ("dpo_lora", "3")])
def test_validate_reproduces_the_metrics_of_fit(recipe, stage, workspace):
    folder = f"runs/{recipe}-{stage}"
    words = ["--config", f"recipes/{recipe}.yaml", "--output_dir", folder, *SMALL]
    done = run_command("fit", *words, "--trainer.zero_stage", stage, "--task.precompute_reference", "true", cwd=workspace)
    assert done.returncode == 0, done.stderr[-3000:]
    reference = "the initial model" if recipe == "dpo_full" else "the model without its adapters"
    assert f"reference: {reference}" in done.stdout
    lines = [json.loads(line) for line in (workspace / folder / "metrics.jsonl").read_text().splitlines()]
    logged = next(line for line in lines if "validation_loss" in line)
    checked = run_command("validate", "--config", f"{folder}/recipe.yaml", cwd=workspace)
    assert checked.returncode == 0, checked.stderr[-3000:]
    metrics = dict(re.findall(r"^(validation_\S+) (\S+)$", checked.stdout, flags=re.MULTILINE))
    for name in ("validation_loss", "validation_rewards/margins", "validation_logps/chosen"):
        assert float(metrics[name]) == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name


def test_kto_and_validate_agree(workspace):
    words = ["--config", "recipes/kto.yaml", *SMALL, "--optimizer.lr", "1e-2", "--task.precompute_reference", "true"]
    done = run_command("fit", *words, "--trainer.accumulate", "1", cwd=workspace)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "desirable" in done.stdout and "reference: the initial model" in done.stdout
    lines = [json.loads(line) for line in (workspace / "runs" / "kto" / "metrics.jsonl").read_text().splitlines()]
    logged = next(line for line in lines if "validation_loss" in line)
    checked = run_command("validate", "--config", "runs/kto/recipe.yaml", cwd=workspace)
    assert checked.returncode == 0, checked.stderr[-3000:]
    metrics = dict(re.findall(r"^(validation_\S+) (\S+)$", checked.stdout, flags=re.MULTILINE))
    for name in ("validation_loss", "validation_kl", "validation_rewards/margins"):
        assert float(metrics[name]) == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name


def test_orpo_needs_no_reference_and_validate_reproduces_its_metrics(workspace):
    words = ["--config", "recipes/orpo.yaml", "--task.model.folder", "runs/sft", "--data.tokenizer", "runs/sft", *SMALL]
    done = run_command("fit", *words, cwd=workspace)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (workspace / "runs" / "orpo" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert "loss" not in line or line["loss"] == pytest.approx(0.1 * line["orpo"] + line["sft"], rel=1e-5)
    checked = run_command("validate", "--config", "runs/orpo/recipe.yaml", cwd=workspace)
    assert checked.returncode == 0, checked.stderr[-3000:]
    (loss,) = re.findall(r"^validation_loss (\S+)$", checked.stdout, flags=re.MULTILINE)
    assert float(loss) == pytest.approx(next(line for line in lines if "validation_loss" in line)["validation_loss"], rel=1e-4)


def test_a_reward_model_is_trained_and_only_scores(workspace, monkeypatch, capsys):
    done = run_command("fit", "--config", "recipes/reward_model.yaml", *SMALL, cwd=workspace)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loss: Bradley-Terry" in done.stdout and "rewards/accuracies" in done.stdout
    config = json.loads((workspace / "runs" / "reward_model" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"] and config["num_labels"] == 1
    assert config["pad_token_id"] is not None
    monkeypatch.chdir(workspace)
    start = ["--task.model.folder", "runs/reward_model", "--output_dir", "runs/wrong"]
    commands = {
        "scores texts and cannot generate them": ["generate", "--model", "runs/reward_model", "--prompt", "a"],
        "only bumblebee.RewardModel trains it": ["fit", "--config", "recipes/dpo_full.yaml", *start, *SMALL],
    }
    for message, words in commands.items():
        with pytest.raises(SystemExit) as refused:
            main(words)
        assert refused.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bumblebee: ")]
        assert message in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task.reference", "nowhere"], "folder not found: nowhere"),
        (["--task.reference", "adapters_off"], "reference: adapters_off needs adapters"),
        (["--task.pref_beta", "0"], "pref_beta must be more than 0, got 0.0"),
        (["--task.reference", "recipes"], "recipes is not a model folder"),
        (["--data.class_path", "datamodules.Pretrain", "--data.files", "recipes/samples/pretrain.jsonl"], "DPO needs pairs"),
    ],
)
def test_a_user_error_is_one_line_and_writes_nothing(words, message, workspace):
    done = run_command("fit", "--config", "recipes/dpo_full.yaml", "--output_dir", "runs/wrong", *SMALL, *words, cwd=workspace)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("bumblebee: ")]
    assert message in line and "Traceback" not in done.stderr
    assert not (workspace / "runs" / "wrong").exists()
