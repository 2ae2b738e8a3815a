"""DPO through the trainer on one rank, with live and precomputed references."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training_runs import Pairs, small_model, train, weight_bytes, weights
from safetensors.torch import load_file
from torch import nn

from bumblebee.checkpoint.sharded_state import ShardReader
from bumblebee.distributed.deepspeed.frozen_engine import FrozenEngine
from bumblebee.distributed.deepspeed.sharded_parameters import full_numel, is_sharded
from bumblebee.tasks import reference_cache
from bumblebee.tasks.dpo import DPO
from bumblebee.tasks.reference import FrozenReference
from bumblebee.tasks.reference_choice import ReferenceChoice
from bumblebee.training import setup
from bumblebee.training.run_state import RunState

PAIRS = ("Pairs", {"samples": 11, "empty": [2]})
BASE: dict[str, Any] = {"data": PAIRS, "max_steps": 5}
STAGES: dict[str, dict[str, Any]] = {
    "0": {"zero_stage": 0},
    "0 bf16": {"zero_stage": 0, "precision": "bf16"},
    "2": {"zero_stage": 2},
    "1 bf16": {"zero_stage": 1, "precision": "bf16"},
    "3": {"zero_stage": 3},
    "3 sharded": {"zero_stage": 3, "building": True},
    "3 sharded bf16": {"zero_stage": 3, "building": True, "precision": "bf16"},
}


def run(folder: Path, kind: str = "DPO", options: dict[str, Any] | None = None, **job: Any) -> list[dict[str, float]]:
    return train(folder, **{"task": (kind, options or {}), **BASE, **job})


def same(metrics: list[dict[str, float]], other: list[dict[str, float]]) -> bool:
    """Equal up to rounding, without accuracies: before the first step all pairs are ties, and rounding decides."""
    cleaned = [[{k: v for k, v in line.items() if k != "rewards/accuracies"} for line in run] for run in (metrics, other)]
    return cleaned[0] == [pytest.approx(line, rel=1e-4, abs=1e-5) for line in cleaned[1]]


def some_slow(quick: tuple[str, ...]) -> list[Any]:
    return [pytest.param(stage, marks=[] if stage in quick else pytest.mark.slow) for stage in STAGES]


@pytest.fixture
def other_model(tmp_path):
    """The folder of another model than the policy."""
    small_model(1).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


# -- first step ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", some_slow(quick=("0", "3 sharded")))
@pytest.mark.parametrize("kind", ["DPO", "AdaptedDPO"])
@pytest.mark.parametrize("precompute", [False, True], ids=["live", "precomputed"])
def test_first_loss_is_ln_2_without_rewards(kind, stage, precompute, tmp_path):
    first = run(tmp_path, kind, {"precompute_reference": precompute}, **{**STAGES[stage], "max_steps": 2})[0]
    tolerance = 1e-6 if "bf16" not in stage or not precompute else 1e-3  # other padding, other rounding
    assert first["loss"] == pytest.approx(math.log(2), abs=tolerance)
    assert abs(first["rewards/margins"]) <= 10 * tolerance


@pytest.mark.parametrize("kind", ["DPO", "AdaptedDPO"])
def test_a_reference_has_no_dropout(kind, tmp_path):
    """Log-probabilities precomputed before training equal those computed live."""
    dropping = {"model": {"attention_dropout": 0.2, "residual_dropout": 0.2, "embedding_dropout": 0.2}}
    live, before = (
        run(tmp_path / str(once), kind, {"precompute_reference": once}, **dropping, zero_stage=0) for once in (False, True)
    )
    assert same(live, before)
    assert live[0]["loss"] != pytest.approx(math.log(2), abs=1e-4), "the policy has dropout"


def test_a_model_folder_as_reference(other_model, tmp_path):
    job = {"micro_batch_size": 11, "accumulate": 1, "max_steps": 1}
    line = run(tmp_path / "run", options={"reference": str(other_model)}, **job)[0]
    data, policy = Pairs(11, [2]), small_model()
    data.setup(0)
    task = DPO(policy)
    task.reference_model = FrozenReference(small_model(1).eval())
    sums = task.training_step(policy, data.collate(data.train))
    assert line["dpo"] == pytest.approx(float(sums["dpo"].detach()) / 10, rel=1e-5)
    assert line["rewards/margins"] == pytest.approx(float(sums["rewards/margins"]) / 10, rel=1e-4)


# -- training ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("DPO", "0"),
        pytest.param("DPO", "2", marks=pytest.mark.slow),
        ("DPO", "3 sharded"),
        ("AdaptedDPO", "0"),
        ("AdaptedDPO", "3 sharded"),
    ],
)
def test_live_and_precomputed_references_train_alike(kind, stage, tmp_path):
    """Also with adapters that have dropout: the policy's random numbers do not affect the reference."""
    live = run(tmp_path / "live", kind, **STAGES[stage])
    precomputed = run(tmp_path / "precomputed", kind, {"precompute_reference": True}, **STAGES[stage])
    assert same(precomputed, live)
    assert max(abs(line["rewards/margins"]) for line in live) > 0.005  # it has learned something


@pytest.mark.slow
@pytest.mark.parametrize("stage", some_slow(quick=("3 sharded",)))
def test_a_precomputed_model_folder_equals_the_live_one(stage, other_model, tmp_path):
    options = {"reference": str(other_model)}
    live = run(tmp_path / "live", options=options, **STAGES[stage])
    precomputed = run(tmp_path / "precomputed", options={**options, "precompute_reference": True}, **STAGES[stage])
    tolerance = 5e-3 if "bf16" in stage else 1e-4
    for one, line in zip(live, precomputed, strict=True):
        assert one == pytest.approx(line, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("kind", ["DPO", "AdaptedDPO"])
def test_logged_metrics_add_up(kind, tmp_path):
    for line in run(tmp_path, kind, {"sft_weight": 0.2, "ld_alpha": 0.5}, log_every=2):
        assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-12)
        assert line["loss"] == pytest.approx(line["dpo"] + 0.2 * line["sft"], rel=1e-9)
        assert 0 <= line["rewards/accuracies"] <= 1


def test_validation_uses_precomputed_log_probabilities(tmp_path):
    lines = []
    for precompute in (False, True):
        folder = tmp_path / str(precompute)
        callbacks = {"validation": ("Validation", {"every": 5}), "history": ("MetricsHistory", {})}
        run(folder, options={"precompute_reference": precompute}, callbacks=callbacks)
        lines.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
    live, precomputed = (next(line for line in run if "validation_loss" in line) for run in lines)
    assert {"validation_loss", "validation_rewards/accuracies", "validation_rewards/margins"} <= set(live)
    del live["seconds"], precomputed["seconds"]
    assert precomputed == pytest.approx(live, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("kind", "words"), [("DPO", "the initial model"), ("AdaptedDPO", "the model without its adapters")])
def test_summary_names_the_reference(kind, words, tmp_path, capsys):
    run(tmp_path, kind, {"precompute_reference": True}, callbacks={"summary": ("RunSummary", {})}, max_steps=1)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("task"))
    assert f"loss: sigmoid; beta 0.1; reference: {words}, log-probabilities computed before training" in line


@pytest.mark.parametrize("reference", ["copy", "folder"])
def test_the_reference_is_sharded_at_stage_3(reference, other_model, tmp_path, monkeypatch):
    """Parameters are empty but for their shards, initially and after a step."""
    seen = []
    freeze = setup.freeze

    def watched(run: RunState, model: nn.Module) -> FrozenEngine:
        engine = freeze(run, model)
        seen.append((engine.model, [whole(parameter) for parameter in engine.model.parameters()]))
        return engine

    def whole(parameter: Any) -> bool:
        assert is_sharded(parameter)
        return full_numel(parameter) > 10 * 32 and parameter.numel() > 0  # DeepSpeed keeps small parameters whole

    monkeypatch.setattr(setup, "freeze", watched)
    options = {"reference": "copy" if reference == "copy" else str(other_model)}
    run(tmp_path / "run", options=options, max_steps=2, **STAGES["3 sharded"])
    ((model, at_first),) = seen
    assert not any(at_first)
    assert not any(whole(parameter) for parameter in model.parameters())


# -- distribution of pairs -----------------------------------------------------------------------------------------------


def test_accumulated_micro_batches_equal_one_large_batch(tmp_path):
    step = {"max_steps": 1, "optimizer": ("SGD", {"lr": 1.0}), "gradient_clip": None}
    options = {"sft_weight": 0.3, "loss_type": "ipo", "length_normalised": True}
    whole = run(tmp_path / "whole", options=options, micro_batch_size=11, accumulate=1, **step)
    for micro, accumulate in ((1, 11), (4, 3)):
        folder = tmp_path / str(micro)
        assert same(run(folder, options=options, micro_batch_size=micro, accumulate=accumulate, **step), whole)
        for name, tensor in weights(folder).items():
            torch.testing.assert_close(tensor, weights(tmp_path / "whole")[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", [pytest.param("2", marks=pytest.mark.slow), "3 sharded"])
def test_all_stages_train_alike(stage, tmp_path):
    plain = run(tmp_path / "0", options={"sft_weight": 0.1}, zero_stage=0)
    assert same(run(tmp_path / stage, options={"sft_weight": 0.1}, **STAGES[stage]), plain)


# -- resume --------------------------------------------------------------------------------------------------------------

EACH = {"checkpoint": ("Checkpoint", {"every": 1, "keep": None})}


def stopped_and_resumed(folder: Path, kind: str, options: dict[str, Any], between: Any = None, **job: Any) -> None:
    """A run that stops after two steps and is resumed."""
    run(folder, kind, options, callbacks={**EACH, "stop": ("StopAfter", {"step": 2})}, **job)
    if between is not None:
        between()
    run(folder, kind, options, callbacks=EACH, resume="auto", **job)


@pytest.mark.slow
@pytest.mark.parametrize("stage", some_slow(quick=("0",)))
@pytest.mark.parametrize("precompute", [False, True], ids=["live", "precomputed"])
def test_resume_is_byte_identical(stage, precompute, tmp_path):
    options = {"precompute_reference": precompute}
    run(tmp_path / "whole", options=options, callbacks=EACH, **STAGES[stage])
    stopped_and_resumed(tmp_path / "pieces", "DPO", options, **STAGES[stage])
    assert weight_bytes(tmp_path / "pieces") == weight_bytes(tmp_path / "whole")


def test_resume_of_adapters_is_byte_identical(tmp_path):
    run(tmp_path / "whole", "AdaptedDPO", callbacks=EACH)
    stopped_and_resumed(tmp_path / "pieces", "AdaptedDPO", {})
    both = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("pieces", "whole")]
    assert both[0] == both[1]


def test_resume_without_the_cache_recomputes_the_reference(tmp_path):
    cache = tmp_path / "cache"
    options = {"precompute_reference": True, "cache_dir": str(cache)}
    run(tmp_path / "whole", options=options, callbacks=EACH)
    stopped_and_resumed(tmp_path / "pieces", "DPO", options, between=lambda: shutil.rmtree(cache))
    assert weight_bytes(tmp_path / "pieces") == weight_bytes(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["0", "3 sharded"])
def test_checkpoints_do_not_hold_the_reference(stage, tmp_path):
    run(tmp_path, callbacks=EACH, **STAGES[stage])
    names = {name for name, _ in small_model().named_parameters()}
    assert set(weights(tmp_path)) == names
    with ShardReader(tmp_path / "checkpoint-5" / "training_state") as reader:
        assert set(reader.shapes) == names


# -- the cache -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """One entry for each time that log-probabilities are computed."""
    times = []
    compute = reference_cache._compute
    monkeypatch.setattr(reference_cache, "_compute", lambda *args: times.append(1) or compute(*args))
    return times


@pytest.mark.slow
def test_the_cache_is_shared_by_losses_and_batch_sizes(computed, tmp_path):
    options = {"precompute_reference": True, "cache_dir": str(tmp_path / "cache")}
    run(tmp_path / "a", options=options)
    run(tmp_path / "b", options={**options, "pref_beta": 0.5, "loss_type": "ipo", "ld_alpha": 0.5}, micro_batch_size=3)
    run(tmp_path / "c", options=options, zero_stage=3)
    assert len(computed) == 1
    file = next((tmp_path / "cache").rglob("*.safetensors"))
    columns = load_file(file)
    assert columns["train/logps"].shape == (10, 2)  # the empty pair is left out
    assert columns["validation/index"].tolist() == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [{"data": ("Pairs", {"content": 1})}, {"model": {"rope_theta": 5e5}}, {"zero_stage": 0, "precision": "bf16"}]
)
def test_other_pairs_model_or_precision_miss_the_cache(change, computed, tmp_path):
    options = {"precompute_reference": True, "cache_dir": str(tmp_path / "cache")}
    run(tmp_path / "a", options=options)
    run(tmp_path / "b", options=options, **change)
    assert len(computed) == 2


def test_the_cache_does_not_depend_on_the_adapters_seed(computed, tmp_path):
    options = {"precompute_reference": True, "cache_dir": str(tmp_path / "cache")}
    run(tmp_path / "a", "AdaptedDPO", options)
    run(tmp_path / "b", "AdaptedDPO", options, seed=7)
    assert len(computed) == 1


def test_a_cached_reference_model_is_not_loaded(other_model, computed, tmp_path, monkeypatch):
    options = {"precompute_reference": True, "reference": str(other_model), "cache_dir": str(tmp_path / "cache")}
    run(tmp_path / "a", options=options)
    monkeypatch.setattr(ReferenceChoice, "load", lambda *_: pytest.fail("it was loaded"))
    run(tmp_path / "b", options=options)
    assert len(computed) == 1


def test_pairs_with_the_same_index_are_refused(tmp_path, monkeypatch):
    whole = Pairs.collate
    monkeypatch.setattr(
        Pairs, "collate", lambda self, samples: {**whole(self, samples), "index": torch.zeros(len(samples)).long()}
    )
    with pytest.raises(ValueError, match="two pairs have the same index"):
        run(tmp_path, options={"precompute_reference": True})
