"""A small mixture of experts through all stages: pretraining, alignment, model folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.training_runs import train

from bumblebee import Bumblebee
from bumblebee.checkpoint.consolidate import consolidate
from bumblebee.cli.main import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, tokenizer_folder) -> Path:
    """``bumblebee fit`` with the quickstart's recipe and the recipe of the model, made smaller."""
    folder = tmp_path_factory.mktemp("moe")
    config = "--task.model.config."
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        main([
            "fit", "--config", "recipes/quickstart/pretrain.yaml", "--task.model", "recipes/models/tiny-moe.yaml",
            f"{config}vocab_size", "400", f"{config}hidden_size", "64", f"{config}num_hidden_layers", "2",
            f"{config}moe_intermediate_size", "32", f"{config}router_bias_update_rate", "0.01",
            "--data.files", "recipes/samples/pretrain.jsonl", "--data.validation_files=null", "--data.validation_ratio", "0.1",
            "--data.tokenizer", str(tokenizer_folder),
            "--data.max_length", "64", "--trainer.max_steps", "4", "--callbacks.checkpoint.every", "2",
            "--callbacks.plot", "null", "--callbacks.progress", "null", "--output_dir", str(folder / "run"),
        ])  # fmt: skip
    return folder / "run"


def test_the_run_logs_losses_and_loads_of_its_routers(pretrained):
    lines = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert len(lines) == 4
    for line in lines:
        assert {"router/balance", "router/z", "router/load", "router/load_worst", "router/entropy"} < line.keys()
        assert 1 <= line["router/load"] <= line["router/load_worst"] <= 4 and line["router/balance"] > 0.9
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_summary_tells_what_a_token_meets_from_what_there_is(pretrained):
    model = json.loads((pretrained / "summary.json").read_text())["model"]
    experts = 2 * 8 * 3 * 64 * 32
    assert model["parameters"] - model["active_parameters"] == experts * 6 // 8
    assert model["parameters"] == Bumblebee.from_pretrained(pretrained).num_parameters()


def test_tensorboard_has_the_routers_load(pretrained):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(next(pretrained.rglob("events.out*")).parent))
    events.Reload()
    assert {"train/router/load", "train/router/entropy"} <= set(events.Tags()["scalars"])


def test_router_bias_stays_fp32_in_folders(pretrained, tmp_path):
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = Bumblebee.from_pretrained(pretrained).state_dict()[key]
    assert bias.dtype == torch.float32 and bias.any()
    half = Bumblebee.from_pretrained(pretrained, dtype=torch.bfloat16)
    assert half.state_dict()[key].equal(bias) and half.lm_head.weight.dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "again")
    assert Bumblebee.from_pretrained(tmp_path / "again").state_dict()[key].equal(bias)
    consolidate(pretrained / "checkpoint-4", tmp_path / "whole")
    whole, there = (Bumblebee.from_pretrained(folder).state_dict() for folder in (tmp_path / "whole", pretrained))
    assert whole.keys() == there.keys() and all(whole[name].equal(there[name]) for name in there)


@pytest.mark.parametrize("stage", [1, 3])
def test_dpo_goes_on_from_the_folder(pretrained, tmp_path, stage):
    lines = train(tmp_path / "dpo", base=str(pretrained), task=("DPO", {}), data=("Pairs", {"samples": 8}), max_steps=2,
                  zero_stage=stage)  # fmt: skip
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and lines[0]["router/balance"] > 0.9
    assert Bumblebee.from_pretrained(tmp_path / "dpo").config.router_bias_update_rate == 0.01
