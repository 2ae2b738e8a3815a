"""The commands of docs/distillation.md, on small models; user errors are one line."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from helpers.documents import ROOT, bumblebee_words, commands
from helpers.training_runs import small_model

from bumblebee.cli.main import main

pytestmark = pytest.mark.slow

SMALL = ["--trainer.precision", "fp32", "--trainer.max_steps", "3", "--optimizer.lr", "1e-3", "--callbacks.tensorboard=null"]


@pytest.fixture
def workspace(tokenizer_folder, tmp_path, monkeypatch):
    """The recipes, and folders of a student and a teacher."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    for seed, name in enumerate(("small", "sft")):
        shutil.copytree(tokenizer_folder, tmp_path / "runs" / name)
        model = small_model(seed, vocab_size=400 + 16 * seed, hidden_size=32 + 16 * seed, max_position_embeddings=1024)
        model.save_pretrained(tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_documented_commands_run_and_validate_reproduces_metrics(workspace, capsys):
    for command in commands(ROOT / "docs" / "distillation.md"):
        words = bumblebee_words(command)
        main([*words, *SMALL] if words[0] == "fit" else words)
        output = capsys.readouterr().out
        if words[0] == "fit":
            assert "teacher: runs/sft" in output
            folder = workspace / (words[words.index("--output_dir") + 1] if "--output_dir" in words else "runs/distill")
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        elif words[0] == "validate":
            metrics = dict(re.findall(r"^(validation_\S+) (\S+)$", output, flags=re.MULTILINE))
            logged = next(line for line in lines if "validation_loss" in line)
            for name in ("validation_loss", "validation_distill/lm_loss", "validation_distill/agreement"):
                assert float(metrics[name]) == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name
    for words, message in {
        ("--task.teacher", "nowhere"): "folder not found: nowhere",
        ("--task.teacher", "recipes"): "recipes",
        ("--task.jsd_beta", "2"): "jsd_beta must be in [0, 1], got 2.0",
    }.items():
        models = ["--task.model.folder", "runs/small", "--data.tokenizer", "runs/small", "--output_dir", "runs/wrong"]
        with pytest.raises(SystemExit) as refused:
            main(["fit", "--config", "recipes/distill.yaml", *models, *SMALL, *words])
        assert refused.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bumblebee: ")]
        assert message in line
        print(line)
    assert not (workspace / "runs" / "wrong").exists()
