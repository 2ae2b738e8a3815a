"""Options of ``bumblebee sweep`` beside those of the recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep is run.

    Args:
        sweep: file with the search space.
        count: number of trials of the sweep, those of earlier sessions included; by default run_cap of the file, or the size of
            the grid.
        parallel: number of trials at the same time; by default one for each entry of devices, or 1.
        devices: one device for each trial, "[0, 1]", or one group of devices for each trial, "[[0, 1], [2, 3]]", which then
            runs under torchrun; null leaves the choice to trainer.device.
        timeout: seconds after which running trials are stopped and saved, so that --resume continues them.
        storage: URL of the database; by default a SQLite file in output_dir/sweep. Several machines may share one.
        resume: continue the sweep in output_dir if there is one, or work on it beside another process.
        overwrite: delete the sweep in output_dir with its trials.
        wandb: W&B project to which each trial is logged; WANDB_MODE=offline writes to the trials' folders only.
    """

    sweep: str
    count: int | None = None
    parallel: int | None = None
    devices: list[int] | list[list[int]] | None = None
    timeout: float | None = None
    storage: str | None = None
    resume: bool = False
    overwrite: bool = False
    wandb: str | None = None
