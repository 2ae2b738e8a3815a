"""A small real training run: Bumblebee, Trainer and Engine as in any run, on rows of random tokens held in memory.

The rows are made to be awkward: packed documents, numbers of targets from 0 to all, an epoch that no number of ranks divides.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from bumblebee.callback import Callback
from bumblebee.config import BumblebeeConfig
from bumblebee.datamodule import Batch, DataModule
from bumblebee.model import Bumblebee
from bumblebee.nn import IGNORE_INDEX
from bumblebee.optim import Schedule
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.trainer import Trainer

VOCABULARY, LENGTH = 256, 32
TARGETS = (32, 1, 7, 0, 20)  # of the rows, in turn
SEED = 42
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": LENGTH, "rope_theta": 10_000.0,
}  # fmt: skip


class Rows(DataModule):
    """Rows of random tokens, each of two documents, the last ``TARGETS[i]`` tokens of row i being targets.

    Args:
        samples: how many.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def setup(self, seed: int) -> None:
        """Draw them; the same in every trial."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(VOCABULARY, (self.samples, LENGTH + 1), generator=generator)
        cuts = torch.randint(1, LENGTH, (self.samples, 1), generator=generator)
        places = torch.arange(LENGTH).expand(self.samples, LENGTH)
        wanted = torch.tensor([TARGETS[i % len(TARGETS)] for i in range(self.samples)])
        self.columns = {
            "input_ids": tokens[:, :-1],
            "labels": tokens[:, 1:].masked_fill(places < LENGTH - wanted[:, None], IGNORE_INDEX),
            "position_ids": torch.where(places < cuts, places, places - cuts),
        }
        self.train = range(self.samples)

    def collate(self, samples: list[Any]) -> Batch:
        """Indices -> a micro-batch."""
        return {name: column[samples] for name, column in self.columns.items()}


class Noisy(LanguageModeling):
    """A loss that draws from every random generator, as dropout would: a resumed run has to continue their series."""

    def training_step(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """The loss times a random number."""
        losses = super().training_step(model, batch)
        device = losses["loss"].device
        noise = float(torch.rand(())) + float(torch.rand((), device=device)) + random.random() + float(numpy.random.random())
        return {name: loss * (0.5 + noise / 4) for name, loss in losses.items()}


@dataclass
class Record(Callback):
    """What happens in a trial; it also saves and stops where it is told to.

    Args:
        save_at: the step after which a checkpoint is written.
        stop_at: the step after which the run ends before its time.
    """

    save_at: int | None = None
    stop_at: int | None = None
    metrics: list[dict[str, float]] = field(default_factory=list)
    before: dict[str, Tensor] = field(default_factory=dict)  # whole weights on the CPU, in fp32
    after: dict[str, Tensor] = field(default_factory=dict)

    def on_fit_start(self, trainer: Trainer) -> None:
        """Keep the weights that training begins with."""
        self.before = _whole_weights(trainer)

    def on_step_end(self, trainer: Trainer) -> None:
        """Stop in time."""
        trainer.should_stop |= trainer.step == self.stop_at

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Keep the metrics of each step."""
        self.metrics.append(metrics)

    def on_save(self, trainer: Trainer) -> None:
        """Save."""
        if trainer.step == self.save_at:
            trainer.save_checkpoint()

    def on_fit_end(self, trainer: Trainer) -> None:
        """Keep the weights. A trial that a signal has ended says nothing."""
        if trainer.interrupted:
            raise KeyboardInterrupt
        self.after = _whole_weights(trainer)


def _whole_weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().float().cpu().clone() for name, tensor in trainer.engine.full_tensors()}


def train(
    record: Record,
    trainer: Trainer,
    rows: Rows,
    optimizer: Callable[..., Any],
    folder: Path,
    attention: str,
    schedule: Schedule | None = None,
    task: type[LanguageModeling] = LanguageModeling,
) -> Record:
    """Run a trial on all ranks.

    Args:
        record: told what happens.
        trainer: the real one.
        rows: to train on.
        optimizer: from parameter groups to an optimizer.
        folder: of the run.
        attention: the kernel.
        schedule: of the learning rate.
        task: the loss.
    """
    try:
        torch.manual_seed(SEED)
        with trainer.building():
            model = Bumblebee(BumblebeeConfig(**SHAPE), attention=attention)
        trainer.fit(task(model), rows, optimizer, schedule, {"record": record}, folder, SEED)
    finally:
        trainer.close()
    return record
