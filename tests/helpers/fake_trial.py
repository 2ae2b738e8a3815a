"""Stands in for ``bumblebee fit`` in tests of sweeps: logs a metric, resumes after its last line, stops on SIGTERM.

usage: fake_trial.py FOLDER VALUE STEPS SECONDS [MODE]        STEPS lines of validation_loss, SECONDS apart

Modes: ``fail`` ends with an error after the first step, ``nan`` logs null, ``silent`` logs another metric.
"""

from __future__ import annotations

import fcntl
import json
import signal
import sys
import time
from pathlib import Path

folder, value, steps, seconds = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
mode = sys.argv[5] if len(sys.argv) > 5 else ""
stopping = []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
held = (folder / "lock").open("w")
try:
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    (folder / "collision").write_text("two processes at the same time")
if (folder / "SHA256SUMS").exists():
    (folder / "collision").write_text("started although it is complete")
with (folder / "starts").open("a") as starts:
    starts.write("start\n")
metrics = folder / "metrics.jsonl"
lines = metrics.read_text().splitlines() if metrics.exists() else []
if lines and not lines[-1].endswith("}"):  # cut off
    lines.pop()
    metrics.write_text("".join(f"{line}\n" for line in lines))
for step in range(len(lines) + 1, steps + 1):
    time.sleep(seconds)
    if mode == "fail":
        print("Traceback (most recent call last):\n  ...\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
        sys.exit(1)
    loss = None if mode == "nan" else value + 1 / step
    with metrics.open("a") as stream:
        stream.write(
            json.dumps({"step": step, "epoch": step / steps, "loss" if mode == "silent" else "validation_loss": loss}) + "\n"
        )
    if stopping:
        sys.exit(0)
(folder / "SHA256SUMS").write_text("")
