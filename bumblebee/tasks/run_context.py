"""RunContext: what a task may use of the run that trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bumblebee.datamodule import Batch, DataModule

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bumblebee.distributed.deepspeed.engine import TrainingEngine
    from bumblebee.distributed.deepspeed.frozen_engine import FrozenEngine


@dataclass(frozen=True)
class RunContext:
    """The parts of a run that ``Task.begin`` receives.

    Args:
        engine: wraps the model; called like the model, it also yields whole weights at any ZeRO stage.
        device: this rank's.
        data: the DataModule, set up.
        seed: of the data order and of random numbers in training.
        precision: "fp32", "bf16" or "fp16".
        zero_stage: 0 to 3.
        micro_batch_size: samples per micro-batch.
        prompts_per_rollout: samples of a rank whose completions are sampled together.
        output_dir: the run's folder; not created yet.
        is_main: whether this is rank 0.
        frozen: puts another model on the run's devices, in its precision, to be called and not trained. Collective.
        building: a context in which models are built; at stage 3 they are sharded as they are built.
        local_batches: yields this rank's share of some samples, in order, as CPU batches; equally many on every rank.
        to_device: moves a batch to the device.
    """

    engine: TrainingEngine
    device: torch.device
    data: DataModule
    seed: int
    precision: str
    zero_stage: int
    micro_batch_size: int
    prompts_per_rollout: int
    output_dir: Path
    is_main: bool
    frozen: Callable[[nn.Module], FrozenEngine]
    building: Callable[[], AbstractContextManager[None]]
    local_batches: Callable[[Sequence[object]], Iterator[Batch]]
    to_device: Callable[[Batch], Batch]
