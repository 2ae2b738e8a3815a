"""GRPO: losses by formula, rewards and their errors, and training on one rank: exact log-probabilities, resume, stages."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import run_jobs
from helpers.training_runs import Questions, RewardedGRPO, Rows, odd_characters, small_model, train, weight_bytes, weights

from bumblebee import GRPO
from bumblebee.nn import IGNORE_INDEX
from bumblebee.nn.batch_invariant import batch_invariant
from bumblebee.rewards import InputReward, RewardInput
from bumblebee.rewards.reward import Failure
from bumblebee.rl.advantages import EPS, advantages_of
from bumblebee.rl.rollout import Rollout, rollout_seed
from bumblebee.rl.training_batch import training_batch
from bumblebee.tasks import weight_gathering
from bumblebee.tasks.pair_log_probs import token_log_probs
from bumblebee.tasks.weight_gathering import choose_gathering

MODEL = {"vocab_size": 320}
JOB: dict[str, Any] = {"data": ("Questions", {}), "model": MODEL, "task": "RewardedGRPO", "max_steps": 4}
REWARDS = torch.tensor([[1.0, 0.0, 0.25], [0.5, 0.5, 0.5]], dtype=torch.float64)


def make_batch() -> dict[str, torch.Tensor]:
    """Two groups of three completions of different lengths after prompts of two and three tokens."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 320, (6, 9), generator=generator)
    labels = torch.full((6, 9), IGNORE_INDEX)
    for row, (begin, length) in enumerate([(1, 3), (1, 6), (1, 1), (2, 5), (2, 2), (2, 4)]):
        labels[row, begin : begin + length] = torch.randint(0, 320, (length,), generator=generator)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": torch.arange(9).repeat(6, 1),
        "sampled_log_probs": torch.zeros(6, 9),
        "advantages": advantages_of(REWARDS, "group_mean").flatten().float(),
        "rewards": REWARDS.view(6, 1),
        "reward": REWARDS.flatten(),
        "truncated": torch.tensor([0, 1, 0, 0, 0, 0], dtype=torch.float64),
        "reward_std": REWARDS.std(dim=1),
    }


def written_out(model: Any, batch: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
    """Log-probability of each token of each completion, from the logits."""
    logits = model(batch["input_ids"], position_ids=batch["position_ids"]).log_softmax(-1)
    return [
        [logits[row, at, label] for at, label in enumerate(labels.tolist()) if label != IGNORE_INDEX]
        for row, labels in enumerate(batch["labels"])
    ]


NORMALISATIONS = {
    "sequence": lambda each: sum(sum(row) / len(row) for row in each) / 6,
    "token": lambda each: sum(sum(row) for row in each) / 21,
    "constant": lambda each: sum(sum(row) for row in each) / (6 * 7),
    "sum": lambda each: sum(sum(row) for row in each) / 6,
}


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_gradient_is_that_of_the_formula(normalise):
    model, batch = small_model(**MODEL), make_batch()
    task = GRPO(model, [odd_characters], group_size=3, max_new_tokens=7, normalise=normalise, importance_cap=None)
    task.total(task.training_step(model, batch), {name: float(n) for name, n in task.counts(batch).items()}).backward()
    given = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    pairs = zip(written_out(model, batch), batch["advantages"].tolist(), strict=True)
    NORMALISATIONS[normalise]([[-advantage * value for value in row] for row, advantage in pairs]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(given[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_logged_entropy_is_that_of_the_distribution():
    """At the targets only; another kind of head logs -log p of the sampled tokens."""
    model, batch = small_model(**MODEL), make_batch()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # far from uniform
        logs = model(batch["input_ids"], position_ids=batch["position_ids"]).double().log_softmax(-1)
    expected = -(logs.exp() * logs).sum(-1)[batch["labels"] != IGNORE_INDEX].sum()
    task = GRPO(model, [odd_characters], group_size=3, max_new_tokens=7)
    for _ in range(2):  # gradients in the forward pass first, then losses only
        sums = task.training_step(model, batch)
        task.total(sums, {name: float(n) for name, n in task.counts(batch).items()}).backward()
        torch.testing.assert_close(sums["rl/entropy"], expected, rtol=1e-5, atol=0)
        assert not sums["rl/entropy"].requires_grad
    task.head = None
    estimate = -token_log_probs(model, batch).detach().sum().double()
    assert task.training_step(model, batch)["rl/entropy"] == estimate
    assert abs(estimate - expected) > 0.01 * expected


def test_packed_completions_have_the_log_probs_and_gradients_of_rows():
    """And the model computes no padding."""
    model = small_model(**MODEL)
    lengths = [[3, 40, 7, 1], [13, 2, 30, 1]]
    groups = [[Rollout(0, [5] * length, [0.0] * length, rewards=[0.0]) for length in group] for group in lengths]
    packed = training_batch([(0, [1, 2, 3]), (1, [4] * 9)], groups, torch.zeros(2, 4))
    rows = {name: value for name, value in packed.items() if not name.startswith("packed_")}
    assert packed["packed_input_ids"].shape == (1, 4 * 3 + 4 * 9 + sum(map(sum, lengths)) - 8)
    weights = torch.arange(rows["labels"].numel()).view_as(rows["labels"])

    def result(batch):
        log_probs = token_log_probs(model, batch)
        return log_probs, *torch.autograd.grad((weights * log_probs).sum(), list(model.parameters()))

    computed = []
    with model.register_forward_pre_hook(lambda module, args: computed.append(args[0].shape)):
        torch.testing.assert_close(result(packed), result(rows), rtol=1e-4, atol=1e-3)
        with batch_invariant(True):
            token_log_probs(model, packed)
    assert computed == [packed["packed_input_ids"].shape, rows["input_ids"].shape, rows["input_ids"].shape]


def test_rows_without_padding_are_not_packed():
    groups = [[Rollout(0, [5] * length, [0.0] * length, rewards=[0.0]) for length in (9, 10)]]
    assert "packed_input_ids" not in training_batch([(0, [1, 2, 3])], groups, torch.zeros(1, 2))


def test_advantages_are_the_formulas():
    first = [1.0, 0.0, 0.25]
    mean = sum(first) / 3
    std = math.sqrt(sum((reward - mean) ** 2 for reward in first) / 2)
    given = {kind: advantages_of(REWARDS, kind) for kind in ("group_std", "group_mean", "leave_one_out", "batch_std")}
    assert given["group_mean"][0].tolist() == pytest.approx([reward - mean for reward in first])
    assert given["group_std"][0].tolist() == pytest.approx([(reward - mean) / (std + EPS) for reward in first])
    assert given["leave_one_out"][0].tolist() == pytest.approx([1.0 - 0.125, 0.0 - 0.625, 0.25 - 0.5])
    assert given["batch_std"].mean().item() == pytest.approx(0.0, abs=1e-12)
    assert given["batch_std"].std().item() == pytest.approx(1.0, rel=1e-3)
    assert not given["group_std"][1].any()  # equal rewards teach nothing


def test_seeds_differ_by_step_prompt_and_number():
    seeds = {
        rollout_seed(*key) for key in [(0, 1, 2, 3), (1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 1, 3), (0, 1, 2, 4), (0, 12, 0, 3)]
    }
    assert len(seeds) == 6


# -- training ------------------------------------------------------------------------------------------------------------


def test_sampled_log_probabilities_are_those_that_are_trained(tmp_path):
    for line in train(tmp_path, **JOB):
        assert line["rl/logprob_drift"] < 1e-5
        assert 0 < line["rl/length"] <= 5
        assert line["rl/reward"] == pytest.approx(line["rl/reward/odd_characters"])
    records = [json.loads(text) for text in (tmp_path / "rollouts" / "step-000001.jsonl").read_text().splitlines()]
    assert len(records) == 4 * 3 and {record["step"] for record in records} == {1}
    for at in range(0, 12, 3):
        assert len({record["prompt"] for record in records[at : at + 3]}) == 1
        assert sum(record["advantage"] for record in records[at : at + 3]) == pytest.approx(0, abs=1e-6)
    assert len({record["completion"] for record in records}) > 6


def test_best_and_worst_completions_are_shown(tmp_path, capsys):
    """On the console, in samples.jsonl and in TensorBoard, with their rewards; none is sampled for it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = train(tmp_path, **JOB, callbacks={"samples": ("Samples", {"every": 3}), "board": ("TensorBoard", {})})
    samples = [json.loads(text) for text in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(each["step"], each["title"]) for each in samples] == [(s, t) for s in (3, 4) for t in ("best", "worst")]
    printed = capsys.readouterr().out
    for best, worst in (samples[:2], samples[2:]):
        records = [json.loads(t) for t in (tmp_path / f"rollouts/step-{best['step']:06d}.jsonl").read_text().splitlines()]
        by_reward = sorted(records, key=lambda record: record["reward"])
        assert (worst["reward"], best["reward"]) == (by_reward[0]["reward"], by_reward[-1]["reward"])
        assert (best["prompt"], best["text"]) in {(record["prompt"], record["completion"]) for record in records}
        assert best["rewards"] == {"odd_characters": best["reward"]}
        assert f"best completion at step {best['step']}, reward {best['reward']:.4g}: {best['prompt']} → " in printed
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    assert [each.step for each in events.Tensors("samples/worst/text_summary")] == [3, 4]
    assert samples[2]["prompt"] in events.Tensors("samples/best/text_summary")[1].tensor_proto.string_val[0].decode()
    assert train(tmp_path, **JOB, overwrite=True)[-1]["rl/reward"] == lines[-1]["rl/reward"]


def test_metrics_describe_the_completions_of_the_step(tmp_path):
    """Over all groups and micro-batches, as computed from the rollouts themselves."""
    for line in train(tmp_path, **JOB):
        records = [json.loads(text) for text in (tmp_path / f"rollouts/step-{line['step']:06d}.jsonl").read_text().splitlines()]
        rewards = torch.tensor([record["reward"] for record in records], dtype=torch.float64)
        lengths = [record["tokens"] for record in records]
        assert line["rl/reward_spread"] == pytest.approx(float(rewards.std(correction=0)))
        assert line["rl/group_variance"] == pytest.approx(float(rewards.view(-1, 3).var(dim=1).mean()))
        assert (line["rl/length_max"], line["rl/length"]) == (max(lengths), pytest.approx(sum(lengths) / len(lengths)))
        assert line["rl/truncated"] == pytest.approx(sum(record["truncated"] for record in records) / len(records))
        assert line["rl/time_sampling"] + line["rl/time_rewards"] + line["rl/time_training"] == pytest.approx(1.0)
        assert line["rl/sampled_tokens_per_second"] > 0 and line["rl/trained_tokens_per_second"] > 0
        assert "_reward_square" not in line


def test_training_raises_the_reward(tmp_path):
    job = {**JOB, "optimizer": ("AdamW", {"lr": 3e-3}), "max_steps": 40, "micro_batch_size": 11, "accumulate": 1}
    rewards = [line["rl/reward"] for line in train(tmp_path, **job)]
    assert sum(rewards[-5:]) > 1.3 * sum(rewards[:5])


def completions(folder: Path, step: int) -> list[tuple[str, float]]:
    lines = (folder / "rollouts" / f"step-{step:06d}.jsonl").read_text().splitlines()
    return [(line["completion"], line["advantage"]) for line in map(json.loads, lines)]


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow), 3])
def test_resume_repeats_the_same_rollouts_and_bytes(stage, tmp_path):
    job = {**JOB, "zero_stage": stage, "callbacks": {"checkpoint": ("Checkpoint", {"every": 1, "keep": None})}}
    train(tmp_path / "whole", **job)
    train(tmp_path / "pieces", **{**job, "callbacks": {**job["callbacks"], "stop": ("StopAfter", {"step": 2})}})
    train(tmp_path / "pieces", **job, resume="auto")
    assert weight_bytes(tmp_path / "pieces") == weight_bytes(tmp_path / "whole")
    for step in range(1, 5):
        assert completions(tmp_path / "pieces", step) == completions(tmp_path / "whole", step)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_all_stages_train_alike(stage, tmp_path):
    train(tmp_path / "0", **JOB, zero_stage=0)
    train(tmp_path / "other", **JOB, zero_stage=stage)
    for name, tensor in weights(tmp_path / "other").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "0")[name], rtol=0, atol=1e-5)


def test_micro_batches_do_not_matter(tmp_path):
    """Up to rounding, while all completions stay the same."""
    whole = train(tmp_path / "whole", **{**JOB, "micro_batch_size": 4, "accumulate": 1})
    parts = train(tmp_path / "parts", **{**JOB, "micro_batch_size": 1, "accumulate": 4})
    for one, other in zip(whole, parts, strict=True):
        assert one["rl/reward"] == pytest.approx(other["rl/reward"])
        assert one["rl/entropy"] == pytest.approx(other["rl/entropy"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_two_ranks_share_the_prompts_of_one(tmp_path):
    """Also at stage 3, and where one rank has no prompt left in the last step of an epoch."""
    one = train(tmp_path / "one", **{**JOB, "micro_batch_size": 1, "accumulate": 2, "max_steps": 6})
    half = {**JOB, "micro_batch_size": 1, "accumulate": 1, "max_steps": 6}
    jobs = [{**half, "folder": str(tmp_path / f"{stage}"), "zero_stage": stage} for stage in (1, 3)]
    for result in run_jobs(jobs, 2, tmp_path):
        for line, other in zip(one, result["metrics"], strict=True):
            assert line["rl/reward"] == pytest.approx(other["rl/reward"])
            assert line["rl/entropy"] == pytest.approx(other["rl/entropy"], rel=1e-5)
            assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    assert (tmp_path / "3" / "rollouts" / "step-000001-rank-1.jsonl").is_file()


@pytest.mark.slow
def test_weights_gathered_by_layer_sample_the_same_completions(tmp_path):
    """One rank finishes first, and has no prompt at all in the last step; no rank ever holds the weights of two blocks."""
    job = {**JOB, "micro_batch_size": 1, "accumulate": 1, "max_steps": 2, "zero_stage": 3}
    job["data"] = ("Questions", {"samples": 3})
    job["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    tasks = {name: ("UnevenGRPO", {"gather_weights": name, "kl_beta": 0.1}) for name in ("all", "layers")}
    jobs = [{**job, "folder": str(tmp_path / name), "task": task} for name, task in tasks.items()]
    whole, by_layer = (result["metrics"] for result in run_jobs(jobs, 2, tmp_path))
    assert {line["held_blocks"] for line in whole} == {2} and {line["held_blocks"] for line in by_layer} == {1}
    for line, other in zip(whole, by_layer, strict=True):
        assert line["grad_norm"] == other["grad_norm"] and line["rl/reward"] == other["rl/reward"]
    for step, rank, count in [("1", "", 3), ("1", "-rank-1", 3), ("2", "", 3), ("2", "-rank-1", 0)]:
        name = f"rollouts/step-00000{step}{rank}.jsonl"
        sampled = [[json.loads(text) for text in (tmp_path / task / name).read_text().splitlines()] for task in tasks]
        for record in (*sampled[0], *sampled[1]):
            del record["place"]  # each run has a folder of its own
        assert len(sampled[0]) == count and sampled[0] == sampled[1]
    assert weight_bytes(tmp_path / "layers") == weight_bytes(tmp_path / "all")


@pytest.mark.slow
def test_auto_gathers_by_layer_where_memory_is_short(tmp_path, monkeypatch):
    job = {**JOB, "max_steps": 1, "zero_stage": 3, "task": "UnevenGRPO"}
    job["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    for free, held in ((1e5, 1), (1e8, 2)):
        monkeypatch.setattr(weight_gathering, "memory_available", lambda device, free=free: free)
        (line,) = train(tmp_path / f"{held}", **job)
        assert line["held_blocks"] == held
    assert str(choose_gathering("auto", 9e8, 1e9)) == "all at once (needs 0.90 GB of 1.00 GB that are free on each device)"
    assert choose_gathering("auto", 9.1e8, 1e9).layers and not choose_gathering("auto", 9.1e8, None).layers


def test_gathering_option_is_refused_where_weights_are_whole(tmp_path):
    with pytest.raises(ValueError, match="task.gather_weights: layers has no effect at trainer.zero_stage 1"):
        train(tmp_path, **{**JOB, "zero_stage": 1, "task": ("RewardedGRPO", {"gather_weights": "layers"})})


def test_adapters_are_trained_unmerged(tmp_path):
    small_model(**MODEL).save_pretrained(tmp_path / "base")
    job = {**JOB, "base": str(tmp_path / "base"), "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}
    job["task"] = ("RewardedGRPO", {"kl_beta": 0.1})  # from the model without its adapters
    lines = train(tmp_path / "run", **{name: value for name, value in job.items() if name != "model"})
    assert all(line["rl/logprob_drift"] < 1e-5 for line in lines)
    assert abs(lines[0]["rl/kl"]) < 1e-9 < lines[-1]["rl/kl"] < 1
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_validation_is_the_reward_of_greedy_completions(tmp_path):
    lines: list[dict[str, float]] = []
    train(tmp_path, **{**JOB, "callbacks": {"validation": ("Validation", {"every": 2}), "metrics": ("MetricsHistory", {})}})
    for text in (tmp_path / "metrics.jsonl").read_text().splitlines():
        lines += [json.loads(text)] if "validation_rl/reward" in text else []
    assert len(lines) == 2
    assert all(line["validation_rl/reward"] == line["validation_rl/reward/odd_characters"] for line in lines)


# -- errors --------------------------------------------------------------------------------------------------------------


def too_few(prompts: list[str], completions: list[str], records: list[Any]) -> list[float]:
    return [1.0]


def nan(prompts: list[str], completions: list[str], records: list[Any]) -> list[float]:
    return [math.nan] * len(prompts)


def words(prompts: list[str], completions: list[str], records: list[Any]) -> list[Any]:
    return ["1.0"] * len(prompts)


def one(prompts: list[str], completions: list[str], records: list[Any]) -> Any:
    return 1.0


def broken(prompts: list[str], completions: list[str], records: list[Any]) -> list[float]:
    raise KeyError("solution")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (too_few, "task.rewards: too_few returned 1 reward for 12 completions"),
        (words, r"task.rewards: words returned '1.0' for a completion of .*questions.jsonl:\d"),
        (one, "task.rewards: one returned 1.0 instead of a list of 12 rewards"),
        (nan, r"task.rewards: nan returned nan for a completion of .*questions.jsonl:\d"),
        (broken, r"task.rewards: broken failed on completions of .*questions.jsonl:\d+.*: KeyError\('solution'\)"),
    ],
)
def test_bad_rewards_are_errors_that_name_them(reward, message, tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.training_runs.odd_characters", reward)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **JOB)


class Unreliable(InputReward):
    """Times out for the first completion of each call."""

    can_fail = True

    def score(self, inputs: Sequence[RewardInput]) -> list[float | Failure]:
        assert all(each.tokens and each.tokens >= len(each.completion) / 20 for each in inputs)
        return [Failure(0.0, "timed out on", timed_out=True), *(float(len(each.completion)) for each in inputs[1:])]


def test_completions_that_time_out_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.training_runs.odd_characters", Unreliable())
    lines = train(tmp_path, **{**JOB, "max_steps": 2})
    assert [(line["rl/reward_timeouts"], line["rl/reward_errors"]) for line in lines] == [(1, 0), (1, 0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "group_size must be at least 2"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 numbers for 1 rewards"),
        ({"importance_cap": 0.5}, "importance_cap must be at least 1, got 0.5"),
        ({"keep_rollouts": -1}, "keep_rollouts must be at least 0, got -1"),
        ({"steps_per_rollout": 0}, "steps_per_rollout must be at least 1, got 0"),
        ({"clip": 1.5}, "clip must be between 0 and 1, or null for none; got 1.5"),
        ({"clip": None, "clip_high": 0.3}, "clip_high: 0.3 has no effect with clip: null"),
        ({"surrogate": "sapo", "clip_high": 0.3}, "clip_high: 0.3 has no effect with sapo"),
        ({"kl_beta": -1.0}, "kl_beta must be at least 0, got -1.0"),
        ({"reference": "copy"}, "reference: copy has no effect without kl_beta"),
        ({"kl_beta": 0.1, "reference": "nowhere"}, "reference must be auto, .* folder not found: nowhere"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RewardedGRPO(small_model(**MODEL), **options)


def test_dropout_is_refused():
    """The model would train another distribution than the one that it samples from."""
    questions, model = Questions(4), small_model(**MODEL)
    questions.setup(0)
    model.dropout = torch.nn.Dropout(0.1)
    with pytest.raises(ValueError, match="GRPO needs a model without dropout; dropout has 0.1"):
        RewardedGRPO(model).setup(questions)


def test_a_reference_of_another_vocabulary_is_refused(tmp_path):
    small_model(vocab_size=64).save_pretrained(tmp_path / "other")
    task = ("RewardedGRPO", {"kl_beta": 0.1, "reference": str(tmp_path / "other")})
    with pytest.raises(
        ValueError, match="reference: the tokenizer has .* ids, but the model in .*other has a vocab_size of 64"
    ):
        train(tmp_path / "run", **{**JOB, "task": task})
    assert not (tmp_path / "run").exists()


def test_data_without_prompts_and_prompts_without_room_are_refused():
    rows, questions = Rows(4), Questions(4)
    rows.setup(0)
    questions.setup(0)
    with pytest.raises(ValueError, match="data: GRPO needs prompts, as from datamodules.Prompts; Rows has none"):
        RewardedGRPO(small_model(**MODEL)).setup(rows)
    with pytest.raises(ValueError, match="task.max_new_tokens: 2000 and the longest prompt's .* exceed the model's 1024"):
        RewardedGRPO(small_model(**MODEL), max_new_tokens=2000).setup(questions)
