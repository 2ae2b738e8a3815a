from __future__ import annotations

import json

import pytest

from callbacks import RunSummary


@pytest.fixture(scope="session")
def summary(whole):
    return json.loads((whole.folder / "summary.json").read_text())


def test_the_model_is_described(summary):
    model = summary["model"]
    assert model["class"] == "Bumblebee" and model["attention"] == "sdpa"
    assert model["parameters"] == model["trainable_parameters"] == 20_768
    assert [model[name] for name in ("layers", "hidden_size", "heads", "kv_heads", "vocabulary")] == [2, 32, 4, 2, 64]


def test_the_plan_says_how_many_samples_make_a_step(summary):
    assert summary["plan"] == {
        "epochs": 2.0, "steps_per_epoch": 3, "steps": 6, "micro_batch_size": 4, "accumulate": 2, "ranks": 1,
        "samples_per_step": 8,
    }  # fmt: skip


def test_optimizer_groups_have_rates_and_sizes(summary):
    assert summary["optimizer"]["class"] == "AdamW"
    rates = [(group["learning_rate"], group["weight_decay"]) for group in summary["optimizer"]["groups"]]
    assert rates == [(0.01, 0.1), (0.01, 0.0)]
    assert sum(group["parameters"] for group in summary["optimizer"]["groups"]) == summary["model"]["parameters"]


def test_data_schedule_device_and_callbacks_are_named(summary):
    assert summary["data"] == {"class": "RandomTokens", "training samples": 22, "validation samples": 4}
    assert summary["schedule"] == {"class": "Linear", "warmup_ratio": 0.5, "warmup_steps": None, "min_ratio": 0.0}
    assert summary["device"] == {"device": "cpu", "name": None, "precision": "fp32", "zero_stage": 1}
    assert summary["callbacks"]["checkpoint"] == "Checkpoint" and len(summary["callbacks"]) == 8


def test_the_block_is_printed_before_the_first_step(whole):
    begin, _, rest = whole.text.partition("step 1/6")
    assert begin.startswith("Bumblebee ") and "Bumblebee 0" not in rest
    for part in (
        "model      Bumblebee, 20.8 k parameters, all trainable, layers 2, hidden size 32, heads 4, kv heads 2, vocabulary 64,"
        " attention sdpa\n",
        "data       RandomTokens, training samples 22, validation samples 4\n",
        "plan       2 epochs of 3 steps = 6 steps of 8 samples (micro-batch 4 x accumulate 2 x ranks 1)\n",
        "device     1 x cpu, fp32, ZeRO stage 1\n",
        "optimizer  AdamW: lr 0.01, weight decay 0.1 for ",
        "gradient clip 1\n",
        f"output     {whole.folder}\n",
    ):
        assert part in begin


def test_a_resumed_run_says_from_where_and_keeps_the_first_rate(continued, summary):
    resumed = json.loads((continued.folder / "summary.json").read_text())
    assert resumed["run"]["resumed_from_step"] == 4 and "resumed    from step 4\n" in continued.text
    assert resumed["optimizer"] == summary["optimizer"]  # not the schedule's rate of that step


def test_parameters_are_counted_whole_under_zero_3(fit, tmp_path):
    run = fit(tmp_path / "run", {"summary": RunSummary()}, max_steps=1, zero_stage=3)
    assert run.error is None
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["model"]["parameters"] == 20_768
    assert sum(group["parameters"] for group in summary["optimizer"]["groups"]) == 20_768
