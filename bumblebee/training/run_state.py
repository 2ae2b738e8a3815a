"""RunState: the options and the state of a training run, which callbacks and the modules in ``training/`` read.

``Trainer`` adds the loop. The types are declared here, because the command line evaluates those of the trainer's own module,
and must not import torch for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bumblebee.callback import Callback
from bumblebee.datamodule import Batch, DataModule
from bumblebee.distributed import process_group
from bumblebee.optim import GroupRule, Schedule
from bumblebee.tasks.task import Task
from bumblebee.training.console import Console
from bumblebee.training.metrics.accumulator import MetricAccumulator
from bumblebee.training.plan import Plan
from bumblebee.training.skipped_steps import SkippedSteps

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bumblebee.distributed.deepspeed.ds_config import DsConfig
    from bumblebee.distributed.deepspeed.engine import TrainingEngine
    from bumblebee.distributed.deepspeed.frozen_engine import FrozenEngine
    from bumblebee.training.fingerprint import Fingerprint
    from bumblebee.training.folder_lock import FolderLock
    from bumblebee.training.prepared_windows import PreparedWindows


class RunState:
    """Attributes of a run, and the collectives that all of its parts use."""

    # The trainer's options, see ``Trainer``.
    max_steps: int | None
    epochs: float
    micro_batch_size: int
    accumulate: int
    precision: str
    zero_stage: int
    deepspeed: DsConfig | str | None
    gradient_clip: float | None
    max_skipped_steps: int
    log_every: int
    resume: str | None
    device_name: str
    workers: int
    groups: list[GroupRule]

    # Set up for each run, see ``training/setup.py``.
    task: Task
    data: DataModule
    schedule: Schedule
    callbacks: dict[str, Callback]
    output_dir: Path
    seed: int
    device: torch.device
    engine: TrainingEngine
    plan: Plan
    fingerprint: Fingerprint  # what a resumed run must have in common with this one
    windows: PreparedWindows  # micro-batches of this rank, step by step
    frozen_engines: list[FrozenEngine]
    lock: FolderLock | None  # on output_dir, on rank 0

    # Changes while the run goes on.
    step: int  # optimizer steps done
    tokens: int  # target tokens trained on, over all ranks
    learning_rate: float
    started: bool  # on_fit_start has run in every callback
    should_stop: bool  # set by callbacks: end the run after this step
    signalled: bool  # this rank has received a signal
    interrupted: bool  # a signal on any rank ends the run
    finished: bool  # the run ended without an error
    skipped: SkippedSteps  # steps whose gradient was not finite
    accumulator: MetricAccumulator  # sums and losses since the last line of metrics
    extra_metrics: dict[str, float]  # added by callbacks to the next line of metrics
    console: Console  # what the run prints besides its progress

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that logs and writes files."""
        return process_group.is_main()

    def print(self, text: str) -> None:
        """Print on rank 0 without tearing the progress bar; FileLog keeps the text too."""
        if self.is_main:
            self.console.print(text)

    def to_device(self, batch: Batch) -> Batch:
        """Move a batch to the run's device. Its documents and targets are found here, on the host; see ``bumblebee/nn``."""
        from bumblebee.nn.documents import move_with_documents
        from bumblebee.nn.targets import move_with_targets

        special = {"position_ids": move_with_documents, "labels": move_with_targets}
        special |= {f"packed_{name}": move for name, move in special.items()}
        return {
            name: special[name](tensor, self.device)
            if name in special and tensor.is_cpu
            else tensor.to(self.device, non_blocking=True)
            for name, tensor in batch.items()
        }

    def reduce_sums(self, sums: Mapping[str, float | Tensor]) -> dict[str, float]:
        """Add named numbers over ranks; exact for integers. Collective; waits for the GPU, once, if one of them is on it."""
        import torch

        values = list(sums.values())
        if all(not torch.is_tensor(value) or value.is_cpu for value in values):
            return dict(zip(sums, process_group.host_sum([float(value) for value in values]), strict=True))
        vector = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=self.device).reshape(()) for value in values])
        return dict(zip(sums, process_group.all_reduce_sum(vector).tolist(), strict=True))
