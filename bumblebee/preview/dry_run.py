"""Dry run: a few real optimizer steps in a subprocess, to measure their peak memory and time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

RESULT, REFUSED = "dry run: ", "refused: "  # first words of the subprocess's only line of output
MAX_MICRO_BATCHES = 4  # per step; the time of more is extrapolated
TIMEOUT = 900.0  # seconds
_LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"
)  # fmt: skip


@dataclass(frozen=True)
class DryRunResult:
    """Measurements of a dry run.

    Args:
        peak: peak memory in bytes, in addition to ``baseline``.
        baseline: memory in bytes of a process that has imported everything; 0 on a GPU.
        step_seconds: durations of whole optimizer steps.
        first_step_seconds: duration of the first step, which may compile kernels.
    """

    peak: int
    baseline: int
    step_seconds: list[float]
    first_step_seconds: float


class DryRunError(RuntimeError):
    """The dry run failed; the message gives the reason."""


def dry_run(recipe: str, micro_batches: float) -> DryRunResult:
    """Run the steps in a subprocess.

    Args:
        recipe: the resolved recipe, as YAML.
        micro_batches: per step and rank, on average.

    Raises:
        DryRunError: out of memory, out of time, or an error.
        ValueError: the recipe is invalid.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-m", "bumblebee.preview.dry_run_process"], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    job = {"recipe": recipe, "micro_batches": micro_batches, "imports": [name for name in sys.modules if name != "__main__"]}
    try:
        out, err = process.communicate(json.dumps(job), timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise DryRunError(f"a few steps take more than {TIMEOUT:.0f} seconds on this machine") from None
    finally:
        process.kill()
        process.wait()
    for line in out.splitlines():
        if line.startswith(REFUSED):
            raise ValueError(json.loads(line.removeprefix(REFUSED)))
    results = [line for line in out.splitlines() if line.startswith(RESULT)]
    if process.returncode or not results:
        raise DryRunError(failure_reason(process.returncode, err))
    return DryRunResult(**json.loads(results[-1].removeprefix(RESULT)))


def failure_reason(returncode: int, err: str) -> str:
    """The reason of a failed subprocess, on one line."""
    if returncode < 0:
        return f"the dry run was killed by signal {-returncode}, possibly out of memory"
    last = (err.strip().splitlines() or ["the dry run failed without a message"])[-1]
    return "out of memory" if "OutOfMemory" in last or "can't allocate memory" in last else last
