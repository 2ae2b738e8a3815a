"""What the benchmarks share: a table, and the line that says where the figures are from."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from datetime import date

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def peak_memory() -> float:
    """The largest resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def in_a_process(script: str, *words: str) -> list[float]:
    """Run a script with words in a process of its own; the numbers on its last line."""
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return sorted(values)[len(values) // 2]


def header(title: str) -> str:
    """Title, command, processor, versions, commit and date."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line] or [platform.processor()]
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{os.cpu_count()} cores of {names[0]}"
    command = "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    return f"# {title}\n\n`{command}`: {device}, torch {torch.__version__}, commit {commit}, {date.today()}\n"


def table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [names, ["---"] * len(names), *rows]]
    return "\n".join(lines)
