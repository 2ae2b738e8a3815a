"""Setting up a run: data, plan, engine, output folder; and resuming it from a checkpoint.

Imports everything that a run needs until its end: a run of days must not break because source files are edited meanwhile.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy
import torch
from torch import nn

import bumblebee.training.validation  # noqa: F401
from bumblebee.callback import Callback
from bumblebee.checkpoint.model_files import files_of
from bumblebee.datamodule import DataModule
from bumblebee.distributed import process_group
from bumblebee.distributed.deepspeed.ds_config import EngineOptions, read_overrides
from bumblebee.distributed.deepspeed.engine import TrainingEngine
from bumblebee.distributed.deepspeed.frozen_engine import FrozenEngine
from bumblebee.distributed.deepspeed.optimizer_probe import check_optimizer
from bumblebee.distributed.deepspeed.zero_init import sharded_init
from bumblebee.optim import Constant, Optimizer, Schedule, parameter_groups
from bumblebee.tasks.run_context import RunContext
from bumblebee.tasks.task import Task
from bumblebee.tasks.weight_gathering import check_gathering
from bumblebee.training import checkpointing, loader, verification_record
from bumblebee.training.console import Console
from bumblebee.training.fingerprint import data_fingerprint, model_fingerprint, optimizer_fingerprint
from bumblebee.training.folder_lock import FolderLock
from bumblebee.training.metrics.accumulator import MetricAccumulator
from bumblebee.training.plan import Plan, Position
from bumblebee.training.prepared_windows import PreparedWindows, check_resumable, resumed_windows, rollout_options
from bumblebee.training.run_folder import check_free, clear, find_resume
from bumblebee.training.run_state import RunState
from bumblebee.training.skipped_steps import SkippedSteps

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer


def set_up(
    run: RunState,
    task: Task,
    data: DataModule,
    optimizer: Callable[[Iterable], Optimizer],
    schedule: Schedule | None,
    callbacks: dict[str, Callback | None] | None,
    output_dir: str | Path,
    seed: int,
    overwrite: bool,
) -> None:
    """Prepare everything a run needs; see ``Trainer.fit`` for the arguments. The folder is changed last.

    Raises:
        ValueError: data, folder or options that cannot be used; nothing has been written then.
    """
    run.task, run.data, run.schedule = task, data, schedule or Constant(warmup_ratio=0.0)
    run.callbacks = {name: callback for name, callback in (callbacks or {}).items() if callback is not None}
    run.output_dir, run.seed = Path(output_dir), seed
    _reset(run)

    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}")
    check_free(run.output_dir, run.resume, overwrite)
    files_of(task.model).check_output(run.output_dir)
    checkpoint = find_resume(run.resume, run.output_dir)
    run.device = process_group.pick_device(run.device_name)
    process_group.start(run.device)
    _on_main(run, lambda: _lock_folder(run))
    if checkpoint is not None:
        checkpointing.verify_checkpoint(checkpoint)
    groups = parameter_groups(task.model, run.groups)
    options = engine_options(run, hidden_size_of(task.model))
    optimizer_device = torch.device("cpu") if "optimizer" in options.offload else run.device
    check_optimizer(optimizer, groups, optimizer_device, run.zero_stage, process_group.world_size())
    check_gathering(task.gather_weights, run.zero_stage)
    data.setup(seed)
    task.setup(data)
    run.plan = make_plan(run, task, data, seed, process_group.world_size(), checkpoint)
    _check_parts(run)
    run.fingerprint = data_fingerprint(data) | model_fingerprint(task)  # before the engine's hooks and casts
    run.engine = TrainingEngine(task.model, optimizer, groups, run.device, options)
    run.fingerprint |= optimizer_fingerprint(run.engine.algorithm)
    if checkpoint is not None:
        checkpointing.check_model_and_optimizer(run, checkpoint)
    task.begin(_run_context(run))
    run.engine.train()
    _seed_everything(seed + process_group.rank())
    if checkpoint is not None:
        checkpointing.load_checkpoint(run, checkpoint)
    _open_folder(run, overwrite)
    pin_memory = run.device.type == "cuda"
    prepared = resumed_windows(run, checkpoint)
    rollout = run.plan.rollout(run.step)
    first_step = run.step if prepared is None else rollout.first + rollout.count
    windows = loader.train_windows(
        data, run.plan, seed, process_group.rank(), first_step, run.workers, pin_memory=pin_memory
    )  # fmt: skip
    run.windows = PreparedWindows(task, run.plan, windows, run.step, prepared)


def _check_parts(run: RunState) -> None:
    """Check that callbacks and schedule can work in this run.

    Raises:
        ValueError: one of them cannot.
    """
    for callback in run.callbacks.values():
        callback.check(cast("Trainer", run))
    validates = any(callback.validates for callback in run.callbacks.values()) and len(run.data.validation or ())
    if run.schedule.needs_validation and not validates:
        kind = type(run.schedule)
        raise ValueError(
            f"{kind.__module__}.{kind.__qualname__} needs validations, or it never changes the learning rate:"
            " set data.validation_ratio or data.validation_files, and add callbacks.Validation"
        )


def _reset(run: RunState) -> None:
    run.step = run.tokens = 0
    run.started = run.should_stop = run.interrupted = run.signalled = run.finished = False
    run.learning_rate = 0.0
    run.skipped = SkippedSteps(run.max_skipped_steps)
    run.accumulator, run.extra_metrics = MetricAccumulator(), {}
    run.frozen_engines = []
    run.console = Console()
    run.lock = None


def make_plan(run: RunState, task: Task, data: DataModule, seed: int, ranks: int, checkpoint: Path | None) -> Plan:
    """Plan the samples of each step, from the start or from where a checkpoint's run stopped.

    Raises:
        ValueError: there are no training samples, the checkpoint's run had other data, or it cannot continue in the middle of
            the checkpoint's rollout batch.
    """
    origin = Position() if checkpoint is None else checkpointing.resumed_position(checkpoint, data, seed)
    sizes = len(data.train), run.micro_batch_size, run.accumulate, ranks
    rollouts = task.steps_per_rollout, task.rollout_epochs
    plan = Plan.of(*sizes, run.epochs, run.max_steps, origin, *rollouts)
    if checkpoint is not None and origin.into:
        check_resumable(checkpoint, checkpointing.saved_rollout_options(checkpoint), rollout_options(task, plan))
    return plan


# -- models and engines ----------------------------------------------------------------------------------------------------


def engine_options(run: RunState, hidden_size: int | None) -> EngineOptions:
    """The options of an engine for a model of this hidden size."""
    overrides = read_overrides(run.deepspeed)
    return EngineOptions(run.precision, run.zero_stage, run.micro_batch_size, run.gradient_clip, overrides, hidden_size)


def hidden_size_of(model: nn.Module) -> int | None:
    """The hidden size in a model's config; None for a model without one."""
    return getattr(getattr(model, "config", None), "hidden_size", None)


@contextmanager
def building(run: RunState) -> Iterator[None]:
    """Build a model under ``sharded_init`` at stage 3, so that no rank holds the whole model."""
    if run.zero_stage < 3:
        yield
        return
    device = process_group.pick_device(run.device_name)
    process_group.start(device)
    with sharded_init(device, engine_options(run, None)):
        yield


def freeze(run: RunState, model: nn.Module) -> FrozenEngine:
    """Put another model on the run's devices, to be called and not trained. Collective.

    Args:
        run: the run, whose engine exists.
        model: may be a ``copy.deepcopy`` of the task's model from before the engine was created.
    """
    options = engine_options(run, hidden_size_of(model))
    run.frozen_engines.append(FrozenEngine(model, run.device, options, copy_of=run.engine.model))
    return run.frozen_engines[-1]


def _run_context(run: RunState) -> RunContext:
    rank, ranks = process_group.rank(), run.plan.world_size
    return RunContext(
        engine=run.engine, device=run.device, data=run.data, seed=run.seed, precision=run.precision, zero_stage=run.zero_stage,
        micro_batch_size=run.micro_batch_size,
        prompts_per_rollout=run.micro_batch_size * run.plan.micro_batches_per_rollout,
        output_dir=run.output_dir, is_main=run.is_main, to_device=run.to_device,
        frozen=lambda model: freeze(run, model),
        building=lambda: building(run),
        local_batches=lambda samples: loader.batches_in_order(run.data, samples, run.micro_batch_size, rank, ranks),
    )  # fmt: skip


# -- seed and folder -------------------------------------------------------------------------------------------------------


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def _open_folder(run: RunState, overwrite: bool) -> None:
    """Create the output folder, and delete an earlier run's files from it if that was requested. Collective."""
    process_group.barrier()  # every rank has checked the folder before one changes it

    def open_folder() -> None:
        run.output_dir.mkdir(parents=True, exist_ok=True)
        if run.lock is None:
            _lock_folder(run)
            check_free(run.output_dir, run.resume, overwrite)  # another run may have begun and ended since
        if overwrite and run.resume is None:
            clear(run.output_dir)
        for partial in run.output_dir.glob(".*.partial"):  # of a run that was killed while saving
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        verification_record.copy_current(run)

    _on_main(run, open_folder)


def _lock_folder(run: RunState) -> None:
    if run.output_dir.is_dir():
        run.lock = FolderLock(run.output_dir)


def _on_main(run: RunState, action: Callable[[], None]) -> None:
    """Do something with the output folder on rank 0; an error reaches all ranks. Collective."""
    error: Exception | None = None
    if run.is_main:
        try:
            action()
        except OSError as failure:
            error = ValueError(f"output_dir: cannot write to {run.output_dir}: {failure.strerror}")
            error.__cause__ = failure
        except ValueError as failure:
            error = failure
    process_group.raise_on_all_ranks(error, "rank 0 cannot use output_dir")
