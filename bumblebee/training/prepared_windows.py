"""PreparedWindows: the micro-batches of each step, as the task prepares them; those of a rollout batch are prepared together.

In the middle of a rollout batch, a checkpoint holds what has been prepared: training_state/rollouts-<rank>.safetensors of each
rank, with a tensor for each micro-batch and name. The resumed run may have another number of ranks, if a step still has the
same samples: then each rank picks its micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from bumblebee.checkpoint.safetensors_writer import save_file
from bumblebee.checkpoint.trainer_state import TRAINING_STATE
from bumblebee.datamodule import Batch
from bumblebee.distributed import process_group
from bumblebee.tasks.task import Task
from bumblebee.training.plan import Plan, SampleRange

if TYPE_CHECKING:
    from bumblebee.training.run_state import RunState


class PreparedWindows:
    """Iterates over this rank's micro-batches of each step. Collective where the task samples.

    Args:
        task: prepares windows.
        plan: of the run.
        windows: of the DataModule, of each rollout batch from ``step`` on; after the prepared one if there is one.
        step: number of steps done.
        prepared: what a checkpoint holds of the rollout batch that ``step`` belongs to.
    """

    def __init__(
        self,
        task: Task,
        plan: Plan,
        windows: Iterator[list[Batch]],
        step: int,
        prepared: list[list[Batch]] | None = None,
    ) -> None:
        self.task, self.plan, self.windows, self.step = task, plan, windows, step
        self.prepared = prepared

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self.step >= self.plan.max_steps:
            raise StopIteration
        rollout = self.plan.rollout(self.step)
        if self.prepared is None:
            self.prepared = self.task.prepare_windows([next(self.windows) for _ in range(rollout.size)], self.step)
        window = self.prepared[(self.step - rollout.first) % rollout.size]
        self.step += 1
        if self.step == rollout.first + rollout.count:
            self.prepared = None
        return window

    def save(self, folder: Path) -> dict[str, str]:
        """Write what has been prepared for later steps; returns the SHA-256 of the file by name, nothing between batches."""
        if self.prepared is None:
            return {}
        tensors = {
            f"{_key(micro_batch)}.{name}": tensor.contiguous()
            for micro_batches, window in zip(self._ranges(), self.prepared, strict=True)
            for micro_batch, batch in zip(micro_batches, window, strict=True)
            for name, tensor in batch.items()
            if micro_batch.first < micro_batch.last
        }
        file = _file(folder, process_group.rank())
        return {file.name: save_file(tensors, file)}

    def _ranges(self) -> list[list[SampleRange]]:
        return self.plan.rollout_window(self.step - 1, process_group.rank())


def resumed_windows(run: RunState, checkpoint: Path | None) -> list[list[Batch]] | None:
    """This rank's prepared micro-batches in a checkpoint; None if it was saved between two rollout batches.

    Raises:
        ValueError: a file is missing or damaged.
    """
    if checkpoint is None or not run.plan.origin.into:
        return None
    saved = _read_all(checkpoint / TRAINING_STATE)
    ranges = run.plan.rollout_window(run.step, process_group.rank())
    missing = [each for window in ranges for each in window if each.first < each.last and _key(each) not in saved]
    if missing:
        raise ValueError(f"trainer.resume: {checkpoint} lacks the rollouts of samples {_key(missing[0])}; use an earlier one")
    blank = run.task.without_targets(next(iter(saved.values())))
    return [[saved.get(_key(each), blank) for each in window] for window in ranges]


def check_resumable(checkpoint: Path, saved: Mapping[str, object], current: Mapping[str, object]) -> None:
    """Check that a run can continue in the middle of a rollout batch.

    Args:
        checkpoint: that it resumes from.
        saved: what the rollout batch depends on, in the checkpoint.
        current: in this run.

    Raises:
        ValueError: names the first option that differs.
    """
    for name, value in saved.items():
        if current.get(name) != value:
            raise ValueError(
                f"trainer.resume: {checkpoint} is in the middle of a rollout batch, which was made with {name} {value};"
                f" this run has {current.get(name)}: set it back, or use a checkpoint between two rollout batches"
            )


def rollout_options(task: Task, plan: Plan) -> dict[str, object]:
    """What a run must have in common with another one to continue in the middle of its rollout batch."""
    return {
        "micro_batch_size": plan.micro_batch_size,
        "samples per step": plan.samples_per_step,
        "steps_per_rollout": plan.steps_per_rollout,
        "rollout_epochs": plan.rollout_epochs,
        **task.prepared_options(),
    }


def _read_all(folder: Path) -> dict[str, Batch]:
    """The prepared micro-batches of all ranks, by their range of samples."""
    batches: dict[str, Batch] = {}
    for file in sorted(folder.glob("rollouts-*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  (not a dict)
                    micro_batch, name = key.split(".", 1)
                    batches.setdefault(micro_batch, {})[name] = tensors.get_tensor(key)
        except (SafetensorError, ValueError, OSError) as error:
            raise ValueError(f"trainer.resume: {file} is damaged: {str(error).splitlines()[0]}") from error
    if not batches:
        raise ValueError(f"trainer.resume: {folder} lacks the rollouts of the rollout batch that it is in the middle of")
    return batches


def _key(micro_batch: SampleRange) -> str:
    return f"{micro_batch.first}-{micro_batch.last}"


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rollouts-{rank:05d}.safetensors"
