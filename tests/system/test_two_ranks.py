"""Two real processes over gloo: the same gradients and loss curves as one process, and byte-identical resumes.

All runs of a fixture share the same two processes, since starting them takes longer than a run.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.processes import run_jobs
from helpers.training_runs import Rows, reference_gradient, small_model, train, train_reference, weight_bytes, weights
from helpers.zero_stages import EACH_STAGE

from bumblebee.checkpoint.trainer_state import checkpoints
from bumblebee.optim import Cosine

pytestmark = pytest.mark.slow

UNEQUAL = (16, 1, 7, 0, 12, 0, 0, 3)
TARGETS = (16, 1, 7, 0, 12)
UNTRAINED = "k_proj.bias"  # its true gradient is zero; Adam amplifies rounding errors to full steps
EACH = {"checkpoint": ("Checkpoint", {"every": 1, "keep": None})}
ADAFACTOR = ("Adafactor", {"lr": 1e-2})
POISON = ("PoisonGradient", {"steps": [2], "rank": 1})
LONG = {"max_steps": 14, "task": "Noisy", "micro_batch_size": 1, "schedule": ("Cosine", {"warmup_steps": 3}),
        "data": {"samples": 22}}  # fmt: skip

GRADIENT = {
    "max_steps": 1,
    "optimizer": ("SGD", {"lr": 1.0}),
    "gradient_clip": None,
    "data": {"samples": 8, "targets": UNEQUAL},
}
CURVE = {"max_steps": 8, "schedule": ("Cosine", {"warmup_ratio": 0.3}), "data": {"samples": 22, "targets": TARGETS}}
# Two samples per rank and step: of the last two of an epoch, rank 1 has none.
SPREAD = {"micro_batch_size": 2, "accumulate": 1}


def of_stages(name: str, stages: tuple[int, ...], **job: Any) -> dict[str, dict[str, Any]]:
    return {f"{name}-{stage}": {"zero_stage": stage, **job} for stage in stages}


def of_every_kind(stages: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """The jobs that run at each stage."""
    return {
        **of_stages("gradient", stages, **GRADIENT, micro_batch_size=4, accumulate=1),
        **of_stages("curve", stages, **CURVE, **SPREAD),
        **of_stages("half", stages, **CURVE, **SPREAD, deepspeed={"communication_data_type": "bf16"}),
    }


def resumed(stage: int, stops: tuple[int, ...], log_every: int = 1) -> dict[str, dict[str, Any]]:
    """An uninterrupted run, and one that is stopped and resumed."""
    run = {"zero_stage": stage, "log_every": log_every, **LONG}
    jobs: dict[str, dict[str, Any]] = {f"whole-{stage}": {**run, "callbacks": EACH}}
    for stop in stops:
        piece = {"folder": f"pieces-{stage}", "resume": "auto", **run}
        jobs[f"until-{stop}-{stage}"] = {**piece, "callbacks": {**EACH, "stop": ("StopAfter", {"step": stop, "rank": 1})}}
    return {**jobs, f"pieces-{stage}": {"folder": f"pieces-{stage}", "resume": "auto", "callbacks": EACH, **run}}


class Runs:
    """The results of jobs on two ranks."""

    def __init__(self, jobs: dict[str, dict[str, Any]], folder: Any, timeout: float) -> None:
        self.root = folder
        named = [{**job, "folder": str(folder / job.get("folder", name))} for name, job in jobs.items()]
        for job in named:
            if "/" in (job.get("resume") or ""):
                job["resume"] = str(folder / job["resume"])
        self.results = dict(zip(jobs, run_jobs(named, 2, folder, timeout), strict=True))

    def metrics(self, name: str) -> list[dict[str, float]]:
        assert "metrics" in self.results[name], self.results[name]
        return self.results[name]["metrics"]

    def folder(self, name: str) -> Any:
        return self.root / name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one rank, with checkpoints."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(folder, callbacks=EACH, zero_stage=1, **{**LONG, "task": "LanguageModeling", "accumulate": 4})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, alone):
    jobs = {
        **of_every_kind((0, 3)),
        **of_stages("gradient-of-ones", (3,), **GRADIENT, micro_batch_size=1, accumulate=4),
        **of_stages("empty", (0, 3), max_steps=2, data={"samples": 8, "targets": (0,)}),
        **resumed(1, (4, 6)),
        **resumed(3, (4,), log_every=3),
        **of_stages("poisoned", (0, 3), **{**LONG, "max_steps": 3}, callbacks={**EACH, "poison": POISON}),
        "signalled": {**LONG, "zero_stage": 1, "callbacks": {"checkpoint": ("Checkpoint", {"every": None}),
                                                             "signal": ("SignalIn", {"step": 4, "rank": 1})}},
        "continued": {**LONG, "zero_stage": 1, "folder": "signalled", "resume": "auto"},
        "other-seed": {**LONG, "folder": "whole-1", "zero_stage": 1, "resume": "auto", "seed": 1},
        "other-data": {**LONG, "folder": "whole-1", "zero_stage": 1, "resume": "auto", "data": {"samples": 23}},
        "from-one-rank": {**LONG, "task": "LanguageModeling", "zero_stage": 3, "resume": str(alone[0] / "checkpoint-5")},
    }  # fmt: skip
    return Runs(jobs, tmp_path_factory.mktemp("ranks"), timeout=280)


@pytest.fixture
def runs_at(request):
    """A function from a stage to the runs that include it: those of stages 1 and 2 have processes of their own."""
    return lambda stage: request.getfixturevalue("runs" if stage in (0, 3) else "more_runs")


def check_gradient(folder):
    """Compare the update of one step of SGD with the gradient of the mean loss over all targets."""
    before = dict(small_model().named_parameters())
    expected = reference_gradient(Rows(8, UNEQUAL))
    for key, after in weights(folder).items():
        torch.testing.assert_close(before[key] - after, expected[key], rtol=0, atol=1e-6, msg=lambda text, k=key: f"{k} {text}")


@pytest.mark.parametrize("stage", EACH_STAGE)
def test_gradient_is_the_mean_over_targets_of_both_ranks(stage, runs_at):
    check_gradient(runs_at(stage).folder(f"gradient-{stage}"))


def test_gradient_does_not_depend_on_accumulation(runs):
    check_gradient(runs.folder("gradient-of-ones-3"))


@pytest.mark.parametrize("stage", EACH_STAGE)
def test_two_ranks_train_like_the_reference_loop(stage, runs_at):
    runs = runs_at(stage)
    lines, final = train_reference(Rows(22, TARGETS), per_step=4, steps=8, schedule=Cosine(0.3), clip=1.0)
    trained = [line for line in runs.metrics(f"curve-{stage}") if "loss" in line]
    for line, expected in zip(trained, lines, strict=True):
        for name in ("loss", "grad_norm"):
            assert math.isclose(line[name], expected[name], rel_tol=2e-6), (line["step"], name)
    for name, tensor in weights(runs.folder(f"curve-{stage}")).items():
        if not name.endswith(UNTRAINED):
            torch.testing.assert_close(tensor, final[name], rtol=0, atol=2e-5, msg=lambda text, n=name: f"{n} {text}")


@pytest.mark.parametrize("stage", EACH_STAGE)
def test_communication_in_bf16_only_rounds_gradients(stage, runs_at):
    """DeepSpeed receives ``communication_data_type``."""
    runs = runs_at(stage)
    pairs = list(zip(runs.metrics(f"half-{stage}"), runs.metrics(f"curve-{stage}"), strict=True))
    difference = max(abs(rounded.get("loss", 0) - exact.get("loss", 0)) for rounded, exact in pairs)
    assert 0 < difference < 5e-3


@pytest.mark.parametrize("stage", [0, 3])
def test_steps_without_targets_do_not_change_weights(stage, runs):
    before = dict(small_model().named_parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(runs.folder(f"empty-{stage}")).items())
    assert all(math.isfinite(value) for line in runs.metrics(f"empty-{stage}") for value in line.values())


@pytest.mark.parametrize("stage", [1, 3])
def test_resume_is_byte_identical(stage, runs):
    """At stage 1 it is resumed twice, once at the end of an epoch; at stage 3 between two lines. Rank 1 requests each stop."""
    assert [line["step"] for line in runs.metrics(f"until-4-{stage}")] == ([1, 2, 3, 4] if stage == 1 else [3])
    assert runs.metrics(f"pieces-{stage}") == runs.metrics(f"whole-{stage}")
    assert weight_bytes(runs.folder(f"pieces-{stage}")) == weight_bytes(runs.folder(f"whole-{stage}"))


@pytest.mark.parametrize("stage", [0, 3])
def test_non_finite_gradient_of_one_rank_is_skipped_on_both(stage, runs):
    assert [line.get("skipped_steps") for line in runs.metrics(f"poisoned-{stage}")] == [None, 1, 1]
    for files in zip(
        *(sorted(runs.folder(f"poisoned-{stage}").glob(f"checkpoint-{n}/*/optimizer*")) for n in (1, 2)), strict=True
    ):
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_signal_to_one_rank_saves_on_both_and_resumes(runs):
    assert len(runs.metrics("signalled")) == 5
    assert [(checkpoint.step, checkpoint.last) for checkpoint in checkpoints(runs.folder("signalled"))] == [(5, True)]
    assert runs.metrics("continued")[-1] == runs.metrics("whole-1")[-1]
    assert weight_bytes(runs.folder("signalled")) == weight_bytes(runs.folder("whole-1"))


@pytest.mark.parametrize(("name", "message"), [("other-seed", "seed 42"), ("other-data", "samples 22")])
def test_resume_with_another_seed_or_data_is_refused(name, message, runs):
    assert "trainer.resume" in runs.results[name]["error"] and message in runs.results[name]["error"]


def test_two_ranks_at_stage_3_resume_one_rank_at_stage_1(runs, alone):
    """The loss curve is the same up to the order in which gradients are added."""
    metrics, expected = runs.metrics("from-one-rank"), alone[1]
    for name in ("step", "tokens"):
        assert [line[name] for line in metrics] == [line[name] for line in expected]
    for line, other in zip(metrics, expected, strict=True):
        assert math.isclose(line.get("loss", 0.0), other.get("loss", 0.0), rel_tol=1e-5), line["step"]


@pytest.mark.parametrize("stage", [0, 2])
def test_one_rank_resumes_two_at_another_stage(stage, runs, tmp_path):
    options = {**LONG, "task": "LanguageModeling", "accumulate": 4, "schedule": ("Constant", {"warmup_ratio": 0.0})}
    for of, name in ((0, "a"), (1, "b")):
        resume = str(runs.folder("whole-3" if of else "whole-1") / "checkpoint-6")
        train(tmp_path / name, resume=resume, zero_stage=stage, **options)
    # Both checkpoints hold the same training, at stages 3 and 1, so that both runs continue alike.
    for name, tensor in weights(tmp_path / "a").items():
        if not name.endswith(UNTRAINED):
            torch.testing.assert_close(tensor, weights(tmp_path / "b")[name], rtol=0, atol=1e-4)


# -- other stages and precisions -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory):
    bf16 = {"max_steps": 24, "precision": "bf16", "schedule": ("Cosine", {}), "data": {"samples": 8, "targets": (16,)}}
    jobs = {
        **of_every_kind((1, 2)),
        **of_stages("bf16", (0, 1, 2, 3), micro_batch_size=1, **bf16),
        **resumed(0, (4, 6)),
        **resumed(2, (4, 6)),
        **of_stages("bf16-whole", (1, 2, 3), **{**LONG, "precision": "bf16"}),
        "workers": {**LONG, "zero_stage": 2, "workers": 2},
        **of_stages("adafactor", (0, 1, 3), max_steps=4, optimizer=ADAFACTOR, callbacks=EACH),
        "adafactor-resumed": {"max_steps": 4, "optimizer": ADAFACTOR, "zero_stage": 0, "resume": "adafactor-0/checkpoint-2"},
    }
    for stage in (1, 2, 3):
        options = {**LONG, "precision": "bf16", "zero_stage": stage, "folder": f"bf16-pieces-{stage}", "resume": "auto"}
        jobs[f"bf16-until-{stage}"] = {**options, "callbacks": {**EACH, "stop": ("StopAfter", {"step": 7})}}
        jobs[f"bf16-pieces-{stage}"] = options
    return Runs(jobs, tmp_path_factory.mktemp("more"), timeout=900)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_stays_close_to_fp32(stage, more_runs):
    lines, _ = train_reference(Rows(8, (16,)), per_step=4, steps=24, schedule=Cosine(), clip=1.0)
    pairs = zip(more_runs.metrics(f"bf16-{stage}"), lines, strict=True)
    assert max(abs(line["loss"] - expected["loss"]) for line, expected in pairs) < 0.004


@pytest.mark.parametrize("stage", [0, 2])
def test_resume_is_byte_identical_at_other_stages(stage, more_runs):
    assert more_runs.metrics(f"pieces-{stage}") == more_runs.metrics(f"whole-{stage}")
    assert weight_bytes(more_runs.folder(f"pieces-{stage}")) == weight_bytes(more_runs.folder(f"whole-{stage}"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resume_in_bf16_is_byte_identical(stage, more_runs):
    assert weight_bytes(more_runs.folder(f"bf16-pieces-{stage}")) == weight_bytes(more_runs.folder(f"bf16-whole-{stage}"))


def test_worker_processes_do_not_change_the_result(more_runs):
    assert weight_bytes(more_runs.folder("workers")) == weight_bytes(more_runs.folder("whole-2"))


@pytest.mark.parametrize("stage", [1, 3])
def test_adafactor_is_refused_above_stage_0(stage, more_runs):
    assert (
        f"torch.optim.Adafactor does not work with trainer.zero_stage {stage}"
        in more_runs.results[f"adafactor-{stage}"]["error"]
    )
    assert not more_runs.folder(f"adafactor-{stage}").exists()


def test_adafactor_resumes_byte_identically_at_stage_0(more_runs):
    assert more_runs.metrics("adafactor-resumed") == more_runs.metrics("adafactor-0")
    assert weight_bytes(more_runs.folder("adafactor-resumed")) == weight_bytes(more_runs.folder("adafactor-0"))
