"""Reading what a trial has written: metrics while they are written, and the error that it ended with."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bumblebee.sweep.trials.trial_log import Progress, TrialLog
from bumblebee.sweep.trials.trial_process import error_message

TRACEBACK = "Traceback (most recent call last):\n  File x\n"
OF_TORCHRUN = "=====\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n-----\ntrain FAILED\n=====\n"


def test_metric_is_read_while_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    log = TrialLog(file, "validation_loss")
    log.read()
    assert log.values == [] and log.progress == Progress()
    file.write_text('{"step": 1, "loss": 5.0, "epoch": 0.5}\n{"step": 1, "validation_loss": 4.0}\n{"step": 2, "valid')
    log.read()
    assert (log.steps, log.values, log.progress) == ([1], [4.0], Progress(1, 0.5))
    with file.open("a") as stream:
        stream.write('ation_loss": null}\nnonsense\n{"step": 2}\n')
    log.read()
    assert log.steps == [1, 2] and math.isnan(log.values[1]) and log.metrics == {"step", "loss", "epoch", "validation_loss"}
    replaced = tmp_path / "new"
    replaced.write_text('{"step": 1, "validation_loss": 4.0}\n{"step": 2, "validation_loss": 3.0}\n')
    replaced.replace(file)  # as a resumed run does
    log.read()
    assert log.values == [4.0, 3.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step 1\nbumblebee: loss is nan at step 3\n", "loss is nan at step 3"),
        (TRACEBACK + "torch.OutOfMemoryError: CUDA out of memory.\n", "torch.OutOfMemoryError: CUDA out of memory."),
        (TRACEBACK + "[rank1]: ValueError: bad\n" + OF_TORCHRUN, "ValueError: bad"),
        ("KeyError\n", "KeyError"),
        ("Segmentation fault\n", "Segmentation fault"),
        ("", ""),
    ],
)
def test_error_is_that_of_the_run(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "output.txt").write_text(text)
    assert error_message(tmp_path / "output.txt") == message
    assert error_message(tmp_path / "none.txt") == ""
