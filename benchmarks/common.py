"""Shared by the benchmarks: command line, subprocesses, medians, and the header and tables of the results."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

# Options of a run that is measured by its validation loss at the end alone.
BARE = ["--callbacks.validation.every", "1000000"]
BARE += [word for name in ("checkpoint", "tensorboard", "baseline", "plot") for word in (f"--callbacks.{name}", "null")]

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def parser(docstring: str | None) -> argparse.ArgumentParser:
    """An argument parser whose help is the script's docstring."""
    return argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)


def peak_memory() -> float:
    """Peak resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def run_in_subprocess(script: str, *args: str) -> list[float]:
    """Run a script in a new process and return the numbers on its last line."""
    done = subprocess.run([sys.executable, script, *args], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


def final_validation_loss(folder: Path) -> float | None:
    """The last validation loss in a run's metrics.jsonl; None if there is none."""
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return next((line["validation_loss"] for line in reversed(lines) if "validation_loss" in line), None)


def median(values: Sequence[float]) -> float:
    """The median; of an even number of values the upper one."""
    return sorted(values)[len(values) // 2]


def processor() -> str:
    """The number of cores and the model of the processor."""
    from bumblebee.hardware.cpu import cpu_name

    return f"{os.cpu_count()} cores of {cpu_name()}"


def commit() -> str:
    """The commit of this checkout; empty outside of one."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def header(title: str) -> str:
    """Title, command, processor, versions, commit and date."""
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else processor()
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of a module that was started with -m
    script = f"-m {spec.name}" if spec else os.path.relpath(sys.argv[0])
    command = " ".join(["python", script, *sys.argv[1:]])
    return f"# {title}\n\n`{command}`: {device}, torch {torch.__version__}, commit {commit()}, {date.today()}\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [columns, ["---"] * len(columns), *rows]]
    return "\n".join(lines)
