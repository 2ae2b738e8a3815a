"""Callbacks on two ranks: they decide alike, only rank 0 prints, and sampling on rank 0 does not block the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.processes import finish, start

from bumblebee import Bumblebee, Generator, SamplingParams
from bumblebee.checkpoint.trainer_state import checkpoints
from bumblebee.evaluation.context import EvaluationContext
from bumblebee.evaluation.tasks import MultipleChoice
from bumblebee.hardware import flops

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 3], ids=["stage2", "stage3"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).parents[1] / "helpers" / "callbacks_on_two_ranks.py"
    done = finish(start([str(script), str(folder), str(request.param)], ranks=2))
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def result(folder, rank):
    return json.loads((folder / f"rank-{rank}.json").read_text())


def test_ranks_stop_together_and_only_rank_0_prints(run):
    first, second = (result(run, rank) for rank in (0, 1))
    assert first["step"] == second["step"] == 6
    assert first["out"].count("early stopping: validation_loss did not improve in 2 validations (best 2.0000)") == 1
    assert second["out"] == ""


def test_time_based_and_best_checkpoints_are_kept(run):
    assert [checkpoint.step for checkpoint in checkpoints(run / "run")] == [2, 6]
    assert json.loads((run / "run" / "best.json").read_text())["checkpoint"] == "checkpoint-2"


def test_throughput_sums_over_ranks(run):
    for line in result(run, 0)["metrics"]:
        if "tflops" in line:
            flops_per_token = line["tflops"] * 2e12 / line["tokens_per_second"]  # of two devices
            break
    model = Bumblebee.from_pretrained(run / "run")

    assert flops_per_token == pytest.approx(flops.weight_flops_per_token(model) + flops.attention_flops_per_token(model, 16))


def test_rank_0_samples_from_the_whole_model(run, read_lines):
    lines = read_lines(run / "run" / "samples.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for step in (2, 6):
        generator = Generator.from_pretrained(run / "run" / f"checkpoint-{step}")
        [expected] = generator.generate(["the bee"], SamplingParams(4, temperature=0.0))
        assert lines[step - 1]["text"] == expected.text


def test_only_rank_0_profiles(run):
    assert (run / "run" / "trace.json").is_file() and "profiler: 1 steps written" in result(run, 0)["out"]


def test_ranks_share_out_the_samples_of_a_task(run, read_lines):
    lines = read_lines(run / "run" / "evaluation.jsonl")
    assert [(line["step"], line["samples"]) for line in lines] == [(2, 3), (4, 3), (6, 3)]
    model = Generator.from_pretrained(run / "run" / "checkpoint-2")
    task = MultipleChoice(str(run / "choices-0.jsonl"))
    context = EvaluationContext(model)
    metrics = task.metrics(task.results(context, task.items(context), lambda count: None))
    assert lines[0]["metrics"] == {name: each._asdict() for name, each in metrics.items()}


def test_evaluations_change_no_byte_of_the_weights_resumed_or_not(run, read_lines):
    weights = [(run / name / "model.safetensors").read_bytes() for name in ("without", "with", "resumed")]
    assert weights[0] == weights[1] == weights[2]
    lines, resumed = (read_lines(run / name / "evaluation.jsonl") for name in ("with", "resumed"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert resumed == lines[2:]
