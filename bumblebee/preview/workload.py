"""The workload of a training run: what one of its steps costs in micro-batches, FLOPs and memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from bumblebee.datamodule import Batch
from bumblebee.distributed.deepspeed.ds_config import EngineOptions
from bumblebee.hardware import flops
from bumblebee.inference.engine_config import EngineConfig
from bumblebee.nn import IGNORE_INDEX
from bumblebee.nn.attention_kernels import kernel_of
from bumblebee.nn.documents import Documents
from bumblebee.preview.memory_estimate import (
    BUCKET_SIZE,
    BatchShape,
    MemoryEstimate,
    ModelSize,
    SamplingShape,
    TrainingSetup,
    estimate_memory,
)
from bumblebee.tasks.task import Task
from bumblebee.tasks.weight_gathering import Gathering, choose_gathering, free_per_rank
from bumblebee.trainer import Trainer
from bumblebee.training.plan import Plan
from bumblebee.training.setup import engine_options


@dataclass(frozen=True)
class Workload:
    """A training run that has been set up, without weights.

    Args:
        task: after ``setup``.
        trainer: with the options of the run.
        plan: for ``ranks`` ranks.
        batch: the largest micro-batch of the first epoch.
        ranks: number of devices.
        device: of this machine.
        device_type: that the run is for, "cpu" or "cuda".
        optimizer_bytes: optimizer state in bytes per trained weight.
    """

    task: Task
    trainer: Trainer
    plan: Plan
    batch: Batch
    ranks: int
    device: torch.device
    device_type: str
    optimizer_bytes: float

    @property
    def model(self) -> nn.Module:
        """The trained model."""
        model: nn.Module = self.task.model
        return model

    @cached_property
    def model_size(self) -> ModelSize:
        """Size of the trained model."""
        return ModelSize.of(self.model)

    @cached_property
    def frozen_models(self) -> list[ModelSize]:
        """Sizes of frozen models, such as a DPO reference."""
        return [ModelSize.of(model) for model in self.task.frozen_models()]

    @property
    def attention_kernel(self) -> str | None:
        """The attention kernel; None for a model that does not choose one of ours."""
        return kernel_of(self.model, self.engine_options.compute_dtype)

    @cached_property
    def engine_options(self) -> EngineOptions:
        """The options of the run's engine."""
        return engine_options(self.trainer, None)

    # -- memory --------------------------------------------------------------------------------------------------------

    def setup(self, ranks: int | None = None) -> TrainingSetup:
        """The options that memory depends on, by default with the run's own number of ranks."""
        options = self.engine_options
        zero = options.overrides.get("zero_optimization", {})
        return TrainingSetup(
            self.trainer.precision, self.trainer.zero_stage, ranks or self.ranks, self.device_type, self.optimizer_bytes,
            offload_optimizer="optimizer" in options.offload,
            offload_weights="param" in options.offload,
            bucket_size=float(zero.get("reduce_bucket_size", BUCKET_SIZE)),
        )  # fmt: skip

    def memory(self, ranks: int | None = None) -> MemoryEstimate:
        """Estimated memory of each device, by default with the run's own number of ranks."""
        if self.completions is None:
            return self._memory(ranks, None)
        layers = self.gathering is not None and self.gathering.layers
        return self._memory(ranks, SamplingShape(*self.completions, layers=layers))

    def _memory(self, ranks: int | None, sampling: SamplingShape | None) -> MemoryEstimate:
        rows, length = self.batch["input_ids"].shape
        targets = int((self.batch["labels"] != IGNORE_INDEX).sum())
        packed = not Documents.find(self.batch["position_ids"]).one_per_row
        shape = BatchShape(rows, length, targets, self.attention_kernel or "sdpa", packed, self.task.heads)
        return estimate_memory(self.model_size, self.setup(ranks), shape, self.frozen_models, sampling)

    @property
    def completions(self) -> tuple[int, int] | None:
        """(completions, positions of each) that a rank samples at a time; None for a task that does not sample."""
        of_batch = self.task.completions_of(self.batch)
        if of_batch is None:
            return None
        return min(of_batch[0] * self.plan.micro_batches_per_rollout, EngineConfig().max_running), of_batch[1]

    @cached_property
    def gathering(self) -> Gathering | None:
        """How sampling gathers the weights; None for a task that does not sample, and below stage 3."""
        if self.completions is None or self.trainer.zero_stage < 3:
            return None
        whole = self._memory(None, SamplingShape(*self.completions))
        is_here = self.device_type == self.device.type
        free = free_per_rank(self.device, self.ranks) if is_here else None
        return choose_gathering(self.task.gather_weights, whole.persistent + whole.sampling, free)

    # -- time ----------------------------------------------------------------------------------------------------------

    @property
    def micro_batches_per_step(self) -> float:
        """Micro-batches per step and rank, on average: the last step of an epoch may have fewer."""
        return self.plan.micro_batches_per_step

    @property
    def flops_per_micro_batch(self) -> float:
        """FLOPs of one rank in a micro-batch like the largest one."""
        rows, length = self.batch["input_ids"].shape
        per_token = flops.weight_flops_per_token(self.model) + flops.attention_flops_per_token(self.model, length)
        sizes = [other.parameters / self.model_size.parameters for other in self.frozen_models]
        if getattr(self.task, "reference", None) == "adapters_off":
            sizes = [1.0]
        return rows * length * per_token * (1 + sum(sizes) / 3)  # a frozen model has a forward pass only

    @cached_property
    def peak_flops(self) -> float:
        """FLOP/s of large matrix products on this machine; 0 if unknown."""
        if self.device_type != self.device.type:
            return 0.0
        dtype = self.engine_options.compute_dtype
        if self.device.type == "cpu":
            return 1e12 * flops.measure_peak_tflops(dtype)
        peak = flops.peak_tflops(torch.cuda.get_device_name(self.device))
        return 1e12 * (peak or 0.0) / (8 if dtype == torch.float32 else 1)

    def estimated_step_seconds(self) -> tuple[float, float] | None:
        """Shortest and longest likely duration of a step, at an MFU of 20 to 60 %; None if the peak is unknown."""
        if not self.peak_flops:
            return None
        seconds = self.flops_per_micro_batch * self.micro_batches_per_step / self.peak_flops
        return seconds / 0.6, seconds / 0.2
