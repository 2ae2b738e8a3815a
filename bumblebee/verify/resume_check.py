"""Save and resume: a run of six steps, and one that is ended after three and continued, must come to the same bits.

The checkpoints after the last step are compared: weights, each rank's optimizer state, each rank's random numbers. The loss
draws from all random generators, the save is in the middle of an epoch, and stage and precision are the user's.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy
import torch

from bumblebee.distributed import process_group
from bumblebee.optim import Cosine
from bumblebee.verify.check_result import Measure
from bumblebee.verify.context import Setting
from bumblebee.verify.training_run import Noisy, Record, Rows, train

STEPS, HALF, ACCUMULATE = 6, 3, 3
PARTS = {"weights": "model*.safetensors", "optimizer state": "*/optimizer-*", "random numbers": "*/random-*"}


def measures(setting: Setting) -> tuple[list[Measure], str]:
    """Bytes that differ, and a note where the machine does not even repeat an uninterrupted run."""
    whole = _run(setting, "whole", Record(save_at=STEPS))
    _run(setting, "halves", Record(save_at=HALF, stop_at=HALF))
    halves = _run(setting, "halves", Record(save_at=STEPS), resume="auto")
    found = [Measure(f"differing bytes of {part}", differing_bytes(whole, halves, part), 0.0) for part in PARTS]
    if all(measure.passed for measure in found):
        return found, ""
    again = _run(setting, "again", Record(save_at=STEPS))
    if not any(differing_bytes(whole, again, part) for part in PARTS):
        return found, ""
    return found, "two runs without an interruption differ as well: this machine does not compute the same twice"


def differing_bytes(one: Path, other: Path, part: str) -> float:
    """Over all files of a part of two checkpoints; a file that one of them lacks differs as a whole."""
    names = {file.relative_to(folder) for folder in (one, other) for file in folder.glob(PARTS[part])}
    assert names, f"{one} has no {part}"
    return float(sum(_differing(one / name, other / name) for name in names))


def _differing(one: Path, other: Path) -> int:
    a, b = (numpy.frombuffer(file.read_bytes() if file.is_file() else b"", dtype=numpy.uint8) for file in (one, other))
    shorter = min(len(a), len(b))
    return int((a[:shorter] != b[:shorter]).sum()) + abs(len(a) - len(b))


def _run(setting: Setting, name: str, record: Record, resume: str | None = None) -> Path:
    rows = Rows(2 * ACCUMULATE * process_group.world_size() * 7 // 2)
    trainer = setting.trainer(setting.options.precision, 0.5, ACCUMULATE, STEPS, resume=resume)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    folder = setting.folder / name
    train(record, trainer, rows, optimizer, folder, setting.options.attention, Cosine(warmup_steps=1), Noisy)
    return folder / f"checkpoint-{STEPS}"
