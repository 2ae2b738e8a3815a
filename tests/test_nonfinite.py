"""A loss that is not finite ends the run: the step and its records are named, and nothing is saved or logged."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training_runs import SMALL, Rows, small_model

import callbacks
from bumblebee.checkpoint.trainer_state import checkpoints
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.trainer import Trainer
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
