"""Dynamic sampling: groups with equal rewards are replaced, whatever the number of ranks, and left out of the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import run_jobs
from helpers.training_runs import PartlyRewardedGRPO, small_model, train, weight_bytes

from bumblebee.nn import IGNORE_INDEX
from bumblebee.rl.dynamic_sampling import Place, fill_places, with_sampled_groups
from bumblebee.rl.rollout import Rollout
from bumblebee.rl.training_batch import training_batch

MODEL = {"vocab_size": 320}
QUESTIONS = ("Questions", {"samples": 24})
JOB: dict[str, Any] = {
    "data": QUESTIONS, "model": MODEL, "max_steps": 3, "task": ("PartlyRewardedGRPO", {"resample_rounds": 8})
}  # fmt: skip


def group(prompt: int, equal: bool) -> list[Rollout]:
    return [Rollout(prompt, [7] * (number + 1), [-1.0] * (number + 1), reward=0.0 if equal else number) for number in range(3)]


def fill(prompts: list[int], rounds: int, equal: Any, step: int = 0) -> tuple[list[Place], list[list[int]]]:
    asked: list[list[int]] = []

    def sample(drawn: list[int]) -> list[list[Rollout]]:
        asked.append(drawn)
        return [group(index, equal(index)) for index in drawn]

    first = [group(index, equal(index)) for index in prompts]
    return fill_places(first, range(20), 42, step, rounds, sample), asked


def test_equal_groups_are_replaced_until_none_or_no_round_is_left():
    even = lambda index: index % 2 == 0  # noqa: E731
    places, asked = fill([0, 1, 2, 3, 4], 8, even)
    assert not any(place.excluded for place in places) and len(asked) < 8
    assert [len(place.groups) > 1 for place in places] == [True, False, True, False, True]
    assert all(place.trained[0][0].prompt % 2 for place in places)
    drawn = [index for each in asked for index in each]
    assert len(drawn) == len(set(drawn)) and not set(drawn) & {0, 1, 2, 3, 4}
    places, asked = fill([0, 1, 2], 1, lambda index: index != 1)
    assert [place.excluded for place in places] == [True, False, True] and [len(each) for each in asked] == [2]


def test_draws_depend_on_step_and_round_and_end_with_the_prompts():
    _, asked = fill([0, 1], 100, lambda index: True)
    assert sorted(index for each in asked for index in each) == list(range(2, 20))
    assert fill([0, 1], 100, lambda index: True)[1] == asked
    assert fill([1, 0], 100, lambda index: True)[1] == [each[::-1] for each in asked]  # the same for each first prompt
    assert fill([0, 1], 100, lambda index: True, step=1)[1] != asked


@pytest.mark.parametrize("normalise", ["sequence", "token", "constant", "sum"])
def test_excluded_groups_count_neither_in_loss_nor_denominator(normalise):
    """Loss and gradient are those of a batch that never had them."""
    groups = [group(3, False), group(4, True)]
    for rollout in (rollout for each in groups for rollout in each):
        rollout.rewards = [rollout.reward]
    places = [Place(groups[:1]), Place(groups[1:], excluded=True)]
    alone = training_batch([(3, [1, 2])], groups[:1], torch.tensor([[-1.0, 0.0, 1.0]]))
    batch = with_sampled_groups(alone, places, 1)
    model = small_model(**MODEL)
    task = PartlyRewardedGRPO(model, normalise=normalise, resample_rounds=1)
    totals = []
    for each in (alone, batch):
        counts = task.counts(each)
        sums = task.training_step(model, each)
        totals.append(task.total(sums, {name: float(count) for name, count in counts.items()}))
    assert totals[0] == totals[1] and int((batch["labels"] != IGNORE_INDEX).any(1).sum()) == 3
    assert (counts["trained"], counts["completions"], counts["groups"]) == (3, 6, 2)
    assert (float(sums["rl/equal_groups"]), float(sums["rl/excluded"]), float(sums["rl/length"])) == (1, 1, 6)


def rollouts(folder: Path, step: int) -> list[dict[str, Any]]:
    files = sorted(folder.glob(f"rollouts/step-{step:06d}*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def test_steps_are_filled_with_useful_groups(tmp_path):
    for line in train(tmp_path, **JOB):
        records = rollouts(tmp_path, int(line["step"]))
        groups = [records[at : at + 3] for at in range(0, len(records), 3)]
        useful = [each for each in groups if any(record["advantage"] for record in each)]
        assert len(useful) == 4 and len({each[0]["place"] for each in groups}) == len(groups)
        assert all(int(record["prompt"].split()[0]) % 2 for each in useful for record in each)
        assert line["rl/resampled"] == (len(groups) - 4) / 4 and line["rl/excluded"] == 0
        assert line["rl/length"] == pytest.approx(sum(record["tokens"] for each in useful for record in each) / 12)
        assert line["rl/logprob_drift"] < 1e-5
    assert line["rl/equal_groups"] in (0.25, 0.5, 0.75, 1.0)


def test_resume_replaces_with_the_same_prompts(tmp_path):
    job = {**JOB, "zero_stage": 3, "callbacks": {"checkpoint": ("Checkpoint", {"every": 1, "keep": None})}}
    train(tmp_path / "whole", **job)
    train(tmp_path / "pieces", **{**job, "callbacks": {**job["callbacks"], "stop": ("StopAfter", {"step": 2})}})
    train(tmp_path / "pieces", **job, resume="auto")
    assert weight_bytes(tmp_path / "pieces") == weight_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_replace_the_same_groups_as_one(tmp_path):
    """Where one rank has more of them than the other, and where places stay empty."""
    task = ("PartlyRewardedGRPO", {"resample_rounds": 1})
    one = train(tmp_path / "one", **{**JOB, "task": task, "micro_batch_size": 1, "accumulate": 4, "max_steps": 6})
    assert any(line["rl/excluded"] for line in one)
    half = {**JOB, "task": task, "micro_batch_size": 1, "accumulate": 2, "max_steps": 6}
    jobs = [{**half, "folder": str(tmp_path / f"{stage}"), "zero_stage": stage} for stage in (1, 3)]
    for result in run_jobs(jobs, 2, tmp_path):
        for line, other in zip(one, result["metrics"], strict=True):
            for name in ("rl/reward", "rl/resampled", "rl/excluded", "rl/equal_groups", "rl/length"):
                assert line[name] == pytest.approx(other[name])
            assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3, abs=1e-6)
    for step in range(1, 7):
        of_one, of_two = (
            [(each["prompt"], each["completion"]) for each in rollouts(tmp_path / run, step)] for run in ("one", "1")
        )
        assert sorted(of_one) == sorted(of_two)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resample_rounds": -1}, "resample_rounds must be at least 0, got -1"),
        ({"resample_rounds": 1, "advantages": "batch_std"}, "from which advantages: batch_std does learn"),
    ],
)
def test_bad_resample_rounds_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PartlyRewardedGRPO(small_model(**MODEL), **options)
