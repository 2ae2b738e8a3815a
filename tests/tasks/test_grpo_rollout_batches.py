"""GRPO with several optimizer steps per rollout batch: what is sampled and trained when, and resuming in the middle."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.processes import ROOT, TESTS, finish, run_jobs, start
from helpers.training_runs import RewardedGRPO, small_model, train, weight_bytes, weights

MODEL = {"vocab_size": 320}
OPTIONS = {"steps_per_rollout": 2, "rollout_epochs": 2, "kl_beta": 0.05}
# 11 prompts: rollout batches of 8 and 3 prompts, trained on in 4 and 2 steps.
JOB: dict[str, Any] = {
    "data": ("Questions", {}), "model": MODEL, "task": ("RewardedGRPO", OPTIONS), "max_steps": 9,
    "optimizer": ("AdamW", {"lr": 1e-2}), "callbacks": {"checkpoint": ("Checkpoint", {"every": 1, "keep": None})},
}  # fmt: skip


def prompts(folder: Path, step: int) -> list[str]:
    lines = (folder / "rollouts" / f"step-{step:06d}.jsonl").read_text().splitlines()
    return [line["prompt"] for line in map(json.loads, lines)][::3]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder, **JOB)


def test_a_rollout_batch_is_trained_on_in_several_steps(whole):
    folder, lines = whole
    assert sorted(file.name for file in (folder / "rollouts").iterdir()) == [f"step-00000{at}.jsonl" for at in (1, 5, 7)]
    assert len(set(prompts(folder, 1) + prompts(folder, 5))) == 11 and len(prompts(folder, 1)) == 8
    assert [line["epoch"] for line in lines[:6]] == [round(at / 11, 6) for at in (2, 4, 6, 8, 10, 11)]
    rewards = [line["rl/reward"] for line in lines]
    assert rewards[:2] == rewards[2:4] and rewards[4] == rewards[5] and rewards[0] != rewards[1]


def test_ratios_are_1_before_the_first_update_only(whole):
    _, lines = whole
    for at, line in enumerate(lines):
        is_first = at in (0, 4, 6)
        assert (abs(line["rl/ratio"] - 1) < 1e-6) == is_first
        assert line["rl/clipped"] == pytest.approx(line["rl/clipped_low"] + line["rl/clipped_high"])
        assert line["rl/logprob_drift"] < 1e-5  # of the sampler from the first forward pass, whatever has been trained since
    assert not lines[0]["rl/clipped"] and any(line["rl/clipped"] for line in lines)
    assert abs(lines[0]["rl/kl"]) < 1e-9 < lines[1]["rl/kl"]


@pytest.mark.parametrize("stop", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)])
def test_resuming_in_the_middle_repeats_the_same_bytes(stop, whole, tmp_path):
    callbacks = {**JOB["callbacks"], "stop": ("StopAfter", {"step": stop})}
    train(tmp_path, **{**JOB, "callbacks": callbacks})
    assert (tmp_path / f"checkpoint-{stop}/training_state/rollouts-00000.safetensors").is_file()
    lines = train(tmp_path, **JOB, resume="auto")
    assert weight_bytes(tmp_path) == weight_bytes(whole[0])
    assert [line["grad_norm"] for line in lines] == [line["grad_norm"] for line in whole[1]]
    assert prompts(tmp_path, 5) == prompts(whole[0], 5)


@pytest.mark.slow
def test_a_shorter_run_ends_in_the_middle_and_can_go_on(whole, tmp_path):
    """The whole rollout batch is sampled, although its last steps are beyond the end."""
    train(tmp_path, **{**JOB, "max_steps": 1})
    train(tmp_path, **JOB, resume="auto")
    assert weight_bytes(tmp_path) == weight_bytes(whole[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 1}, "in the middle of a rollout batch, which was made with micro_batch_size 2; this run has 1"),
        ({"accumulate": 1}, "made with samples per step 4; this run has 2"),
        ({"task": ("RewardedGRPO", {**OPTIONS, "rollout_epochs": 3})}, "made with rollout_epochs 2; this run has 3"),
        ({"task": ("RewardedGRPO", {**OPTIONS, "kl_beta": 0.0})}, "with reference with kl_beta; this run has without kl_beta"),
    ],
)
def test_other_batches_are_refused_in_the_middle(changes, message, whole, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **{**JOB, **changes}, resume=str(whole[0] / "checkpoint-1"))


@pytest.mark.slow
def test_other_batches_may_follow_between_rollout_batches(whole, tmp_path):
    changes = {"accumulate": 1, "task": ("RewardedGRPO", {**OPTIONS, "rollout_epochs": 1}), "max_steps": 8}
    lines = train(tmp_path, **{**JOB, **changes}, resume=str(whole[0] / "checkpoint-4"))
    assert [line["epoch"] for line in lines[4:]] == [round(at / 11, 6) for at in (10, 11, 13, 15)]


@pytest.mark.slow
def test_killed_in_the_middle_and_resumed_on_other_ranks(tmp_path):
    """kill -9 on one rank; 1 rank x 2 = 2 ranks x 1: the same rollouts and, to rounding, the same gradients."""
    one = {**JOB, "micro_batch_size": 1, "accumulate": 2, "max_steps": 5}
    two = {**one, "accumulate": 1}
    folders = {name: tmp_path / name for name in ("one", "two", "killed")}
    lines = train(folders["one"], **one)
    kill = {**one["callbacks"], "kill": ("KillIn", {"step": 3})}
    alone = tmp_path / "job"  # its store, which the killed process leaves behind, must not be that of the two ranks
    alone.mkdir()
    (alone / "jobs.json").write_text(json.dumps([{**one, "callbacks": kill, "folder": str(folders["killed"])}]))
    killed = finish(start([str(TESTS / "helpers" / "run_jobs.py"), str(alone)], env={"LOCAL_RANK": "0"}))
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    shutil.copytree(folders["killed"], folders["two"])

    again = train(folders["killed"], **one, resume="auto")
    assert weight_bytes(folders["killed"]) == weight_bytes(folders["one"])
    (result,) = run_jobs([{**two, "folder": str(folders["two"]), "resume": "auto"}], 2, tmp_path)
    for expected, same, other in zip(lines, again, result["metrics"], strict=True):
        assert same["grad_norm"] == expected["grad_norm"]
        assert other["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        assert other["rl/reward"] == pytest.approx(expected["rl/reward"])
    for name, tensor in weights(folders["two"]).items():
        torch.testing.assert_close(tensor, weights(folders["one"])[name], rtol=0, atol=1e-3)


def test_variants_in_the_docs_are_options_of_the_task():
    table = (ROOT / "docs" / "rl.md").read_text().partition("### Published variants")[2].partition("\nOn the same rollouts")[0]
    rows = [re.findall(r"`(\w+: [^`]+)`", row) for row in table.splitlines() if row.startswith("| ")][1:]
    assert len(rows) == 9
    for row in rows:
        RewardedGRPO(small_model(**MODEL), **{name: value for pair in row for name, value in yaml.safe_load(pair).items()})
