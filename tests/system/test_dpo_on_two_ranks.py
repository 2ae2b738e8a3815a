"""DPO on two ranks trains like one rank, at every stage, with every kind of reference; so do reward models, KTO, students."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import run_jobs
from helpers.training_runs import small_model, train, weight_bytes, weights

pytestmark = pytest.mark.slow

OPTIONS = {"sft_weight": 0.2, "ld_alpha": 0.7}
STEP: dict[str, Any] = {"data": ("Pairs", {"samples": 11, "empty": [2, 3]}), "max_steps": 3, "optimizer": ("SGD", {"lr": 0.3})}
REWARD = ("RewardModel", {"center_rewards_coefficient": 0.1})
LABELLED = ("Labelled", {"samples": 11, "empty": [2, 3]})
EACH = {"checkpoint": ("Checkpoint", {"every": 1, "keep": None})}
# Rank 1 has none of the last two of an epoch's 11 pairs.
SPREAD = {"micro_batch_size": 2, "accumulate": 2}


def job(stage: int, precompute: bool = False, kind: str = "DPO", **more: Any) -> dict[str, Any]:
    reference = {name: more.pop(name) for name in ("reference", "cache_dir") if name in more}
    options = {**OPTIONS, "precompute_reference": precompute, **reference}
    return {"task": (kind, options), "zero_stage": stage, "building": stage == 3, **STEP, **SPREAD, **more}


def student(teacher: Path) -> tuple[str, dict[str, object]]:
    """Distillation on the tokens of the responses, with the model of another folder as the teacher."""
    return "Distillation", {"teacher": str(teacher), "divergence": "jsd", "lm_weight": 0.2}


def kto_job(stage: int, reference: Path, **options: Any) -> dict[str, Any]:
    options = {"reference": str(reference), "desirable_weight": 1.3, **options}
    return {**job(stage), "task": ("KTO", options), "data": LABELLED}


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """The folder of another model than the policy."""
    folder = tmp_path_factory.mktemp("other")
    small_model(1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def distant_model(tmp_path_factory):
    """The folder of a model from which the policy differs so that KTO's z0 is above 0 in each step."""
    folder = tmp_path_factory.mktemp("distant")
    small_model(3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, other_model, distant_model):
    """The same steps on one rank."""
    folder = tmp_path_factory.mktemp("one")
    spread = {"micro_batch_size": 8, "accumulate": 1}
    runs = {"DPO": job(0, **spread), "AdaptedDPO": job(0, kind="AdaptedDPO", **spread)}
    runs["other"] = job(0, reference=str(other_model), **spread)
    runs["kto"] = {**kto_job(0, distant_model), **spread}
    runs["reward"] = {**job(0, **spread), "task": REWARD}
    runs["student"] = {**job(0, **spread), "task": student(other_model)}
    return {name: (folder / name, train(folder / name, **one)) for name, one in runs.items()}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, other_model, distant_model):
    folder = tmp_path_factory.mktemp("two")
    jobs = {f"{stage}": job(stage) for stage in (0, 1, 2, 3)}
    jobs |= {f"{stage} precomputed": job(stage, precompute=True, cache_dir=str(folder / f"cache-{stage}")) for stage in (1, 3)}
    jobs |= {f"{stage} adapters": job(stage, kind="AdaptedDPO") for stage in (1, 3)}
    jobs |= {f"{stage} other": job(stage, reference=str(other_model)) for stage in (1, 3)}
    jobs["3 other precomputed"] = job(3, precompute=True, reference=str(other_model), cache_dir=str(folder / "cache-other"))
    jobs |= {f"{stage} reward": {**job(stage), "task": REWARD} for stage in (1, 3)}
    jobs |= {f"{stage} student": {**job(stage), "task": student(other_model)} for stage in (1, 3)}
    jobs |= {f"{stage} kto": kto_job(stage, distant_model) for stage in (1, 3)}
    cache = str(folder / "cache-kto")
    jobs["3 kto precomputed"] = kto_job(3, distant_model, precompute_reference=True, cache_dir=cache)
    jobs["3 until 2"] = job(3, callbacks={**EACH, "stop": ("StopAfter", {"step": 2, "rank": 1})}, folder="3 resumed")
    jobs["3 resumed"] = job(3, callbacks=EACH, folder="3 resumed", resume="auto")
    named = [{**one, "folder": str(folder / one.get("folder", name))} for name, one in jobs.items()]
    return folder, dict(zip(jobs, run_jobs(named, 2, folder, timeout=280), strict=True))


@pytest.mark.parametrize(
    "name",
    ["0", "1", "2", "3", "1 precomputed", "3 precomputed", "1 other", "3 other", "3 other precomputed", "1 reward", "3 reward",
     "1 kto", "3 kto", "3 kto precomputed", "1 student", "3 student"],
)  # fmt: skip
def test_two_ranks_train_like_one(name, one_rank, two_ranks):
    folder, results = two_ranks
    kind = next((kind for kind in ("kto", "other", "reward", "student") if kind in name), "DPO")
    expected_folder, expected = one_rank[kind]
    for line, other in zip(results[name]["metrics"], expected, strict=True):
        for key in set(other) - {"rewards/accuracies"}:  # rounding decides about ties
            assert math.isclose(line[key], other[key], rel_tol=1e-4, abs_tol=1e-5), (line["step"], key)
        assert kind == "student" or line["rewards/margins"] == pytest.approx(
            line["rewards/chosen"] - line["rewards/rejected"], abs=1e-12
        )
        assert kind != "kto" or line["kl"] > 0.01
    for key, tensor in weights(folder / name).items():
        torch.testing.assert_close(
            tensor, weights(expected_folder)[key], rtol=0, atol=1e-5, msg=lambda text, k=key: f"{k} {text}"
        )


@pytest.mark.parametrize("stage", ["1", "3"])
def test_adapters_start_without_rewards(stage, two_ranks):
    """After the first step, their dropout differs from one rank's."""
    lines = two_ranks[1][f"{stage} adapters"]["metrics"]
    assert abs(lines[0]["rewards/chosen"]) < 1e-6 and abs(lines[0]["rewards/rejected"]) < 1e-6
    assert abs(lines[-1]["rewards/margins"]) > 1e-4


def test_resume_at_stage_3_is_byte_identical(two_ranks):
    folder, results = two_ranks
    assert [line["step"] for line in results["3 until 2"]["metrics"]] == [1, 2]
    assert weight_bytes(folder / "3 resumed") == weight_bytes(folder / "3")
