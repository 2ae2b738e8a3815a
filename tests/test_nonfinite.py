"""Losses, gradients and weights that are not finite.

A loss or a weight ends the run: the step and its records are named, and nothing is saved or logged. A step with such a gradient
is skipped and counted; several in a row end the run. Two ranks: ``system/test_two_ranks.py``.
"""

from __future__ import annotations

import functools
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training_runs import SMALL, Rows, small_model, train, weights
from helpers.zero_stages import EACH_STAGE

import callbacks
from bumblebee.checkpoint.trainer_state import checkpoints
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.trainer import Trainer
from bumblebee.training.skipped_steps import SkippedSteps
from datamodules import Pretrain


class Poisoned(LanguageModeling):
    """The loss of the n-th micro-batch is NaN."""

    def __init__(self, model: torch.nn.Module, at: int) -> None:
        super().__init__(model)
        self.at, self.seen = at, 0

    def training_step(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        self.seen += 1
        factor = float("nan") if self.seen == self.at else 1.0
        return {name: loss * factor for name, loss in super().training_step(model, batch).items()}


def fit(folder: Path, data: Any, at: int, log_every: int = 1, every: int = 1, vocab_size: int = 64) -> None:
    trainer = Trainer(**{**SMALL, "max_steps": 6, "accumulate": 2, "micro_batch_size": 1, "log_every": log_every})
    named = {"checkpoint": callbacks.Checkpoint(every=every, keep=None), "metrics": callbacks.MetricsHistory()}
    task = Poisoned(small_model(vocab_size=vocab_size), at)
    trainer.fit(task, data, functools.partial(torch.optim.SGD, lr=0.1), None, named, folder)


def test_step_and_sample_are_named_and_nothing_is_saved(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"^step 4: the loss is not finite. The micro-batch came from sample \d+\."):
        fit(tmp_path, Rows(samples=40), at=8)  # the second micro-batch of step 4
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [1, 2, 3]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "model.safetensors").exists()


def test_losses_are_checked_before_a_save(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="^step 3: "):
        fit(tmp_path, Rows(samples=40), at=5, log_every=100, every=2)
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [2]


def test_files_and_lines_of_records_are_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f'{{"text": "A sentence about the bees, number {i}."}}\n' for i in range(40)))
    data = Pretrain(str(file), str(tokenizer_folder), max_length=100)
    with pytest.raises(FloatingPointError, match=r"came from \S*texts.jsonl:\d+ \S*texts.jsonl:\d+") as caught:
        fit(tmp_path / "run", data, at=1, vocab_size=400)
    lines = {int(word.rstrip(".").rsplit(":", 1)[1]) for word in str(caught.value).split() if "texts.jsonl:" in word}
    # The micro-batch's text is that of the named lines.
    order = next(i for i in range(len(data.train)) if f"texts.jsonl:{min(lines)}" in data.origin(i))
    text = " ".join(data.tokenizer.decode(labels.tolist()) for _, labels in data.train[order])
    for line in lines:
        assert f"number {line - 1}." in text


# -- gradients -----------------------------------------------------------------------------------------------------------

EACH = {"checkpoint": ("Checkpoint", {"every": 1, "keep": None})}


def poisoned(steps: list[int], keep: int | None = None) -> dict[str, Any]:
    """Callbacks that save each step and make the gradient of some steps NaN."""
    return {"checkpoint": ("Checkpoint", {"every": 1, "keep": keep}), "poison": ("PoisonGradient", {"steps": steps})}


FAST = [(0, "fp32", 1.0), (3, "fp32", 1.0)]
SLOW = [(1, "fp32", 1.0), (2, "fp32", None), (0, "bf16", None), *((stage, "bf16", 1.0) for stage in (1, 2, 3))]


@pytest.mark.parametrize(
    ("stage", "precision", "clip"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_step_with_non_finite_gradient_changes_nothing(stage, precision, clip, tmp_path, caplog) -> None:
    run = {"zero_stage": stage, "precision": precision, "gradient_clip": clip, "max_steps": 4, "data": {"targets": (16,)}}
    with caplog.at_level(logging.WARNING, "bumblebee"):
        metrics = train(tmp_path, callbacks=poisoned([2]), **run)
    assert [line.get("skipped_steps") for line in metrics] == [None, 1, 1, 1]
    assert [math.isfinite(line["grad_norm"]) for line in metrics] == [True, False, True, True]
    assert all(math.isfinite(line["loss"]) for line in metrics)
    assert "step 2: the gradient is not finite; skipped (1 in a row" in caplog.text
    states = [sorted((tmp_path / f"checkpoint-{step}" / "training_state").glob("optimizer-*")) for step in (1, 2, 3)]
    first, skipped, after = ([file.read_bytes() for file in files] for files in states)
    assert first == skipped != after


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_skipped_gradient_is_not_kept_with_offload(stage, tmp_path) -> None:
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    run = {"zero_stage": stage, "precision": "bf16", "deepspeed": offload, "max_steps": 4, "data": {"targets": (16,)}}
    metrics = train(tmp_path, callbacks=poisoned([2]), **run)
    assert [line.get("skipped_steps") for line in metrics] == [None, 1, 1, 1]


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_skipped_steps_in_a_row_end_the_run(stage, tmp_path) -> None:
    """The count survives a resume, and the checkpoints from before the skipped steps are kept."""
    run = {"zero_stage": stage, "max_skipped_steps": 3, "max_steps": 9, "data": {"samples": 40, "targets": (16,)}}
    callbacks = poisoned([2, 4, 5, 6], keep=1)
    train(tmp_path, callbacks={**callbacks, "stop": ("StopAfter", {"step": 5})}, **run)
    with pytest.raises(FloatingPointError, match=r"^step 6: the gradients of 3 steps in a row .*max_skipped_steps: 3"):
        train(tmp_path, callbacks=callbacks, resume="auto", **run)
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [3, 4, 5]


def test_search_for_the_loss_scale_is_not_counted_as_in_a_row() -> None:
    skipped = SkippedSteps(limit=2)
    for step in range(1, 6):
        skipped.add_skipped(step, scale_lowered=True)
    assert skipped.state_dict() == {"total": 5, "in_a_row": 0}
    skipped.add_skipped(6, scale_lowered=False)
    skipped.add_taken()
    skipped.add_skipped(8, scale_lowered=False)
    with pytest.raises(FloatingPointError, match="step 9: the gradients of 2 steps in a row"):
        skipped.add_skipped(9, scale_lowered=False)


def test_deepspeed_cannot_be_told_to_take_such_steps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trainer.deepspeed.bf16.check_grad_overflow is False.*drop it"):
        train(tmp_path, precision="bf16", zero_stage=2, deepspeed={"bf16": {"check_grad_overflow": False}})


# -- the result ----------------------------------------------------------------------------------------------------------


def test_nan_model_is_not_the_result_of_a_stopped_run(tmp_path: Path) -> None:
    run = {"log_every": 50, "optimizer": ("SGD", {"lr": 1e38}), "gradient_clip": None, "data": {"targets": (16,)}}
    with pytest.raises(FloatingPointError, match="^step 2: the loss is not finite"):
        train(tmp_path, callbacks={"stop": ("StopAfter", {"step": 2})}, **run)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("stage", EACH_STAGE)
def test_weights_are_checked_before_a_save(stage, tmp_path) -> None:
    """Loss and gradient of the only step are finite."""
    run = {"zero_stage": stage, "log_every": 50, "optimizer": ("SGD", {"lr": math.inf}), "data": {"targets": (16,)}}
    with pytest.raises(FloatingPointError, match=r"^step 1: the weights of \S+ are not finite"):
        train(tmp_path, callbacks={**EACH, "stop": ("StopAfter", {"step": 1})}, **run)
    assert not checkpoints(tmp_path) and not (tmp_path / "model.safetensors").exists()


def test_large_finite_weights_are_no_error(tmp_path: Path) -> None:
    """The sum of their squares overflows."""
    model = small_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(1e25)
    trainer = Trainer(**{**SMALL, "max_steps": 1})
    data = Rows(samples=8, targets=(0,))
    trainer.fit(LanguageModeling(model), data, functools.partial(torch.optim.SGD, lr=0.1), output_dir=tmp_path)
    assert weights(tmp_path)["model.norm.weight"].eq(1e25).all()
