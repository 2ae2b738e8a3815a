"""Commands and scripts in processes of their own, under a launcher for several ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent

_RANK_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)  # of a launcher around the tests


def start(module: list[str], ranks: int = 1, launcher: str = "torchrun", **options: Any) -> subprocess.Popen[str]:
    """Start a module or script, ``["-m", name, ...]`` or ``[path, ...]``, under a launcher for several ranks."""
    inherited = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
    path = os.pathsep.join([str(ROOT), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**inherited, "PYTHONPATH": path, **options.pop("env", {})}
    words = [sys.executable, *module]
    if ranks > 1 and launcher == "torchrun":  # standalone picks a free port
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *module]
    elif ranks > 1:
        port = str(20_000 + os.getpid() % 20_000)
        words = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "--master_port", port]
        words += ["--module" if word == "-m" else word for word in module]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(words, text=True, env=environment, **options)


def finish(process: subprocess.Popen[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Wait for a process. On a timeout, terminate it with all its ranks, and fail the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # a killed launcher would leave its ranks running
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        pytest.fail(f"{process.args} took more than {timeout} s\n{out[-3000:]}\n{err[-3000:]}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_command(*words: str, ranks: int = 1, launcher: str = "torchrun", **options: Any) -> subprocess.Popen[str]:
    """Start ``bumblebee WORDS``, under a launcher for several ranks."""
    return start(["-m", "bumblebee", *words], ranks, launcher, **options)


def run_command(*words: str, ranks: int = 1, launcher: str = "torchrun", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``bumblebee WORDS`` to its end; ``timeout`` in seconds."""
    timeout = options.pop("timeout", 240)
    return finish(start_command(*words, ranks=ranks, launcher=launcher, **options), timeout)


def run_jobs(jobs: list[dict[str, Any]], ranks: int, folder: Path, timeout: float = 280) -> list[dict[str, Any]]:
    """Results of ``training_runs.run`` for each job, run by the same processes one after the other."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = finish(start([str(TESTS / "helpers" / "run_jobs.py"), str(folder)], ranks), timeout)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "results.json").read_text())
