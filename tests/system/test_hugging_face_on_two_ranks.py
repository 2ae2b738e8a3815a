"""Two ranks train a wrapped transformers model like one process, and resume byte-identically."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import run_command, run_jobs
from helpers.training_runs import VOCABULARY, train, weight_bytes, weights

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "recipes"
STAGES = range(4)


def test_two_ranks_equal_one_and_resume_at_every_stage(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")

    def job(folder: str, ranks: int, stage: int, **changes: Any) -> dict[str, Any]:
        save = {"checkpoint": ("Checkpoint", {"every": 3, "keep": None})}
        # A larger eps than usual: Adam blows up the rounding of tiny gradients.
        adam = ("AdamW", {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4})
        common = {"folder": str(tmp_path / folder), "base": str(tmp_path / "base"), "callbacks": save, "optimizer": adam}
        return {**common, "zero_stage": stage, "micro_batch_size": 1, "accumulate": 4 // ranks, **changes}

    jobs = [job(f"{stage}", 2, stage) for stage in STAGES]
    jobs += [job(f"again-{stage}", 2, stage, resume=str(tmp_path / f"{stage}" / "checkpoint-3")) for stage in STAGES]
    assert not [result for result in run_jobs(jobs, 2, tmp_path) if "error" in result]
    train(**job("one", 1, 0))
    for stage in STAGES:
        assert weight_bytes(tmp_path / f"again-{stage}") == weight_bytes(tmp_path / f"{stage}"), stage
        for name, tensor in weights(tmp_path / "one").items():
            torch.testing.assert_close(weights(tmp_path / f"{stage}")[name], tensor, rtol=0, atol=1e-5, msg=f"{stage} {name}")


def test_padding_row_trains_and_validates_at_stage_3(tokenizer_folder, tmp_path: Path) -> None:
    import transformers

    config = transformers.Olmo2Config(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.Olmo2ForCausalLM(config).save_pretrained(tmp_path / "base")
    shutil.copytree(RECIPES, tmp_path / "recipes")
    words = ["--config", "recipes/continue_pretrain.yaml", "--output_dir", "out", "--trainer.max_steps", "1"]
    words += ["--task.model", "bumblebee.HuggingFaceModel.from_pretrained", "--task.model.folder", "base"]
    words += ["--data.tokenizer", str(tokenizer_folder), "--data.max_length", "64", "--trainer.zero_stage", "3"]
    done = run_command("fit", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    measured = next(line["validation_loss"] for line in lines if "validation_loss" in line)
    done = run_command("validate", "--config", "out/recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split()[1]) == pytest.approx(measured, rel=1e-4)
