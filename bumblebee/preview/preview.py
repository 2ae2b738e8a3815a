"""Collect what a recipe would do.

The model is built without weights. If it fits this machine, a dry run measures memory and time; otherwise, and for more than
one rank, they are computed from ``memory_estimate`` and the FLOP count. The report says which.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import Namespace
from torch import nn

from bumblebee.datamodule import Batch, DataModule
from bumblebee.distributed import process_group
from bumblebee.distributed.deepspeed.ds_config import deepspeed_config
from bumblebee.hardware import memory_stats
from bumblebee.optim import Constant, Schedule, parameter_groups
from bumblebee.preview.data_subset import select_micro_batches
from bumblebee.preview.dry_run import MAX_MICRO_BATCHES, DryRunError, DryRunResult, dry_run
from bumblebee.preview.workload import Workload
from bumblebee.recipe import OptimizerFactory, Run, dump
from bumblebee.tasks.task import Task
from bumblebee.tasks.weight_gathering import check_gathering
from bumblebee.training.run_folder import check_free, find_resume
from bumblebee.training.setup import engine_options, make_plan

logger = logging.getLogger(__name__)

AUTO_LIMIT = 60.0  # seconds that a dry run may take with --measure auto
_MIN_STEPS = 4  # of a dry run


@dataclass(frozen=True)
class Preview:
    """What a recipe would do, as ``preview_report`` prints it.

    Args:
        data: the DataModule, set up.
        workload: plan, memory and FLOPs of the run.
        schedule: of the learning rate.
        learning_rate: of the optimizer; None if it does not tell.
        output_dir: folder of the run.
        dry_run: its measurements; None if memory and time are computed.
        why_computed: why there is no dry run.
        warnings: reasons why a training run would not start that are not errors of the recipe.
    """

    data: DataModule
    workload: Workload
    schedule: Schedule
    learning_rate: float | None
    output_dir: Path
    dry_run: DryRunResult | None
    why_computed: str
    warnings: list[str]

    @property
    def total_memory(self) -> float:
        """Bytes of each device. For several ranks, the measurement of one less what the estimates say that ZeRO saves."""
        estimate = self.workload.memory()
        if self.dry_run is None:
            return estimate.total
        single_rank = self.workload.memory(ranks=1)
        return max(self.dry_run.peak + estimate.total - single_rank.total, estimate.persistent)

    @property
    def step_seconds(self) -> tuple[float, float] | None:
        """Shortest and longest likely duration of a step; None if unknown."""
        if self.dry_run is None:
            return self.workload.estimated_step_seconds()
        return 0.95 * min(self.dry_run.step_seconds), 1.05 * max(self.dry_run.step_seconds)


def collect(
    run: Run,
    config: Namespace,
    ranks: int | None = None,
    measure: Literal["auto", "always", "never"] = "auto",
    gpu: bool = False,
    overwrite: bool = False,
) -> Preview:
    """Set the run up without weights and collect its preview.

    Args:
        run: built from the recipe, the model without weights.
        config: the parsed recipe.
        ranks: number of devices to plan for; None for those of the launcher.
        measure: whether to do a dry run; auto does one if it fits and is quick.
        gpu: estimate the memory of GPUs, whatever device this machine has.
        overwrite: an earlier run in the output folder may be deleted.

    Raises:
        ValueError: data, folder or options that a training run would refuse.
    """
    workload, learning_rate = _set_up(run, config, ranks, gpu)
    result, why_computed = None, _why_computed(workload, measure)
    if not why_computed:
        logger.info("dry run: measuring a few steps in a subprocess ...")
        try:
            result = dry_run(dump(config), workload.micro_batches_per_step)
        except DryRunError as error:
            why_computed = str(error)
    return Preview(
        run.data, workload, run.schedule or Constant(warmup_ratio=0.0), learning_rate, Path(run.output_dir),
        result, why_computed, _warnings(run, overwrite),
    )  # fmt: skip


def _set_up(run: Run, config: Namespace, ranks: int | None, gpu: bool) -> tuple[Workload, float | None]:
    trainer, data, task = run.trainer, run.data, run.task
    device = process_group.pick_device(trainer.device_name)
    device_type = "cuda" if gpu else device.type
    if trainer.precision == "fp16" and device_type == "cpu":
        raise ValueError("trainer.precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    check_gathering(task.gather_weights, trainer.zero_stage)
    data.setup(run.seed)
    task.setup(data)
    ranks = ranks or process_group.world_size()
    plan = make_plan(trainer, task, data, run.seed, ranks, find_resume(trainer.resume, Path(run.output_dir)))
    learning_rate, optimizer_bytes = probe_optimizer(run.optimizer, config.optimizer)
    parameter_groups(task.model, trainer.groups)
    hidden_size = getattr(getattr(task.model, "config", None), "hidden_size", None)
    deepspeed_config(engine_options(trainer, hidden_size))
    largest = select_micro_batches(data, trainer.micro_batch_size, run.seed)[0]
    batch = task.largest_batch(data.collate([data.train[index] for index in largest]))
    _require_targets(task, data, batch)
    return Workload(task, trainer, plan, batch, ranks, device, device_type, optimizer_bytes), learning_rate


def _require_targets(task: Task, data: DataModule, batch: Batch) -> None:
    """Raise if no training sample has a target: every step would be skipped."""

    def has_targets(batch: Batch) -> bool:
        return any(int(count) > 0 for count in task.counts(batch).values())

    if has_targets(batch):
        return
    logger.info("looking for a sample with a target ...")
    if not any(has_targets(task.largest_batch(data.collate([data.train[index]]))) for index in range(len(data.train))):
        raise ValueError(f"data: nothing to train on: none of the {len(data.train)} training samples has a target")


def _why_computed(workload: Workload, measure: str) -> str:
    """Why memory and time are computed; empty if a dry run measures them."""
    if workload.device_type != workload.device.type:
        return "this machine has no GPU"
    if measure != "auto":
        return "--measure never" if measure == "never" else ""
    needed, free = workload.memory(ranks=1).total, memory_stats.memory_available(workload.device)
    if free is not None and needed > 0.8 * free:
        return f"the run needs {format_bytes(needed)}, {format_bytes(free)} are free"
    if not workload.peak_flops:
        return ""
    micro_batches = min(workload.micro_batches_per_step, MAX_MICRO_BATCHES) * _MIN_STEPS
    seconds = micro_batches * workload.flops_per_micro_batch / 0.3 / workload.peak_flops
    return f"a dry run would take about {seconds:,.0f} seconds, see --measure" if seconds > AUTO_LIMIT else ""


def _warnings(run: Run, overwrite: bool) -> list[str]:
    try:
        check_free(Path(run.output_dir), run.trainer.resume, overwrite)
    except ValueError as error:
        return [str(error)]
    return []


def probe_optimizer(factory: OptimizerFactory, config: Namespace) -> tuple[float | None, float]:
    """Return the learning rate and the bytes of optimizer state per weight, by one step on a small matrix.

    DeepSpeed's own optimizers need a GPU or a compiler; they are assumed to be Adam.

    Args:
        factory: builds the optimizer from parameters.
        config: class path and options of the optimizer.
    """
    if config.class_path.startswith("deepspeed."):
        return config.init_args.get("lr"), 8.0
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = factory([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    tensors = [value for value in optimizer.state[weight].values() if torch.is_tensor(value) and value.dim()]
    state_bytes = sum(tensor.nbytes for tensor in tensors)
    return optimizer.param_groups[0]["lr"], state_bytes / weight.numel()


def format_bytes(count: float) -> str:
    """Bytes as MB (10^6) or GB (10^9)."""
    return f"{count / 1e6:,.0f} MB" if count < 999.5e6 else f"{count / 1e9:,.2f} GB"
