"""Partial sums of the next line of metrics, saved in a checkpoint between two lines so that a resumed run continues them.

Each rank writes its own sums to training_state/metrics-<rank>.json, if there are any. With the same ranks the line is the same
to the last bit; with another number of ranks, the new ones divide the files of the old ones between them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import torch

from bumblebee.checkpoint.digests import file_digest
from bumblebee.distributed import process_group
from bumblebee.utils.json_files import read_json
from bumblebee.utils.text_files import write_text

if TYPE_CHECKING:
    from bumblebee.training.run_state import RunState


class _Window(TypedDict):
    """One rank's file.

    Args:
        sums: of losses and metrics, on this rank.
        counts: what to divide them by, over all ranks.
        task: the task's ``metric_sums`` on this rank.
        extra: metrics that callbacks have added.
    """

    sums: dict[str, float]
    counts: dict[str, float]
    task: dict[str, list[object]]
    extra: dict[str, float]


def save_window(run: RunState, folder: Path) -> dict[str, str]:
    """Write this rank's sums since the last line of metrics, if there are any; returns the SHA-256 of the file by name."""
    window: _Window = {
        "sums": {name: float(value) for name, value in run.accumulator.sums.items()},
        "counts": run.accumulator.counts,
        "task": {name: value.tolist() for name, value in run.task.metric_sums().items()},
        "extra": {name: value if isinstance(value, int) else float(value) for name, value in run.extra_metrics.items()},
    }
    if not any(window.values()):
        return {}
    file = _file(folder, process_group.rank())
    write_text(file, json.dumps(window))
    return {file.name: file_digest(file)}


def load_window(run: RunState, folder: Path, saved_ranks: int) -> None:
    """Restore what ``save_window`` wrote on ``saved_ranks`` ranks; nothing if the checkpoint was saved after a line."""
    if not _file(folder, 0).is_file():
        return
    first = _read(_file(folder, 0))
    shares = (_file(folder, index) for index in range(process_group.rank(), saved_ranks, run.plan.world_size))
    windows = [_read(file) for file in shares if file.is_file()]
    # Every rank has every name, also one without a file: the sums are reduced over ranks.
    run.accumulator.sums = {name: sum(window["sums"].get(name, 0.0) for window in windows) for name in first["sums"]}
    run.accumulator.counts, run.extra_metrics = first["counts"], first["extra"]
    sums = {}
    for name, value in first["task"].items():
        parts = [window["task"][name] for window in windows if name in window["task"]]
        tensors = [torch.tensor(part, dtype=torch.float64, device=run.device) for part in parts]
        sums[name] = sum(tensors, start=torch.zeros_like(torch.tensor(value, dtype=torch.float64, device=run.device)))
    run.task.restore_metric_sums(sums)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"metrics-{rank:05d}.json"


def _read(file: Path) -> _Window:
    window = read_json(file)
    for name in _Window.__annotations__:
        if not isinstance(window.get(name), dict):
            raise ValueError(f"trainer.resume: {file} is damaged: {name} is missing")
    return cast("_Window", window)
