"""A small real training run: Bumblebee, Trainer and Engine as in any run, on random tokens held in memory.

The rows are awkward on purpose: packed documents, from none to all tokens as targets, an epoch that no number of ranks divides.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from torch import Tensor

from bumblebee.callback import Callback
from bumblebee.checkpoint.sharded_state import ShardReader
from bumblebee.config import BumblebeeConfig
from bumblebee.datamodule import Batch, DataModule
from bumblebee.model import Bumblebee
from bumblebee.nn import IGNORE_INDEX
from bumblebee.optim import Optimizer, Schedule
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.tasks.task import ForwardFn, Task
from bumblebee.trainer import Trainer

VOCAB_SIZE, LENGTH = 256, 32
NUM_TARGETS = (32, 1, 7, 0, 20)  # of the rows, in turn
SEED = 42


def build_model(attention: str, **options: float) -> Bumblebee:
    """Build the model of the run, randomly initialized; ``options`` of its config, such as dropout."""
    config = BumblebeeConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH, rope_theta=10_000.0,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
    return Bumblebee(config, attention=attention)


def reference_model(weights: Mapping[str, Tensor], device: torch.device) -> Bumblebee:
    """Build the same model with naive attention and these weights."""
    model = build_model("naive")
    model.load_state_dict(dict(weights))
    return model.to(device)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


class RandomTokens(DataModule[int]):
    """Rows of random tokens, two documents each. The last ``num_targets[i]`` tokens of row i are targets.

    Args:
        samples: number of rows.
        num_targets: of the rows, in turn.
    """

    def __init__(self, samples: int, num_targets: Sequence[int] = NUM_TARGETS) -> None:
        self.samples, self.num_targets = samples, num_targets

    def setup(self, seed: int) -> None:
        """Draw the rows, the same in every run."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(VOCAB_SIZE, (self.samples, LENGTH + 1), generator=generator)
        boundaries = torch.randint(1, LENGTH, (self.samples, 1), generator=generator)
        positions = torch.arange(LENGTH).expand(self.samples, LENGTH)
        targets = torch.tensor([self.num_targets[i % len(self.num_targets)] for i in range(self.samples)])
        self.columns = {
            "input_ids": tokens[:, :-1],
            "labels": tokens[:, 1:].masked_fill(positions < LENGTH - targets[:, None], IGNORE_INDEX),
            "position_ids": torch.where(positions < boundaries, positions, positions - boundaries),
        }
        self.train = range(self.samples)

    def collate(self, samples: list[int]) -> Batch:
        """Return the rows with these indices as a micro-batch."""
        return {name: column[samples] for name, column in self.columns.items()}


class NoisyLanguageModeling(LanguageModeling):
    """A loss that draws from every random generator, as dropout does: a resumed run must continue all of their states."""

    def training_step(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        """Return the loss times a random number."""
        losses = super().training_step(model, batch)
        device = losses["loss"].device
        noise = float(torch.rand(())) + float(torch.rand((), device=device)) + random.random() + float(numpy.random.random())
        return {name: loss * (0.5 + noise / 4) for name, loss in losses.items()}


@dataclass
class RunRecorder(Callback):
    """Records the weights and metrics of a run; saves a checkpoint and stops at given steps.

    Args:
        save_at: step after which a checkpoint is saved.
        stop_at: step after which the run stops early.
    """

    save_at: int | None = None
    stop_at: int | None = None
    metrics: list[dict[str, float]] = field(default_factory=list)
    initial_weights: dict[str, Tensor] = field(default_factory=dict)  # gathered, on the CPU, in fp32
    final_weights: dict[str, Tensor] = field(default_factory=dict)

    def on_fit_start(self, trainer: Trainer) -> None:
        """Record the initial weights."""
        self.initial_weights = _gather_weights(trainer)

    def on_step_end(self, trainer: Trainer) -> None:
        """Stop after ``stop_at``."""
        trainer.should_stop |= trainer.step == self.stop_at

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Record the metrics of a step."""
        self.metrics.append(metrics)

    def on_save(self, trainer: Trainer) -> None:
        """Save after ``save_at``."""
        if trainer.step == self.save_at:
            trainer.save_checkpoint()

    def on_fit_end(self, trainer: Trainer) -> None:
        """Record the final weights. Raises KeyboardInterrupt if a signal ended the run: its results mean nothing."""
        if trainer.interrupted:
            raise KeyboardInterrupt
        self.final_weights = _gather_weights(trainer)


def _gather_weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().float().cpu().clone() for name, tensor in trainer.engine.full_tensors()}


def run_training(
    recorder: RunRecorder,
    trainer: Trainer,
    data: RandomTokens,
    optimizer: Callable[[Iterable], Optimizer],
    folder: Path,
    attention: str,
    schedule: Schedule | None = None,
    task: Callable[[Bumblebee], Task] = LanguageModeling,
    model_options: Mapping[str, float] | None = None,
) -> RunRecorder:
    """Run a training on all ranks and return the recorder.

    Args:
        recorder: its only callback.
        trainer: a fresh one; it is closed afterwards.
        data: the rows.
        optimizer: builds the optimizer from parameter groups.
        folder: output folder of the run.
        attention: the attention kernel.
        schedule: of the learning rate.
        task: builds the task from the model.
        model_options: see ``build_model``.
    """
    try:
        torch.manual_seed(SEED)
        with trainer.building():
            model = build_model(attention, **(model_options or {}))
        trainer.fit(task(model), data, optimizer, schedule, {"recorder": recorder}, folder, SEED)
    finally:
        trainer.close()
    return recorder


def saved_state(checkpoint: Path, kind: str) -> dict[str, Tensor]:
    """Read the fp32 weights (``WEIGHTS``) or a kind of optimizer state of each parameter from a checkpoint of any stage."""
    with ShardReader(checkpoint / "training_state") as shards:
        return {name: shards.read(kind, name, 0, math.prod(shape)).reshape(shape) for name, shape in shards.shapes.items()}
