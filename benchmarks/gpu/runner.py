"""Run a part in a process of its own, and hand on what it reports as it comes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import TypedDict

from benchmarks.gpu.parts import ROOT, Part, command_line
from benchmarks.gpu.results import RESULT, SKIPPED

LAST_LINES = 25  # of the output of a part that failed


class Outcome(TypedDict, total=False):
    """How a part ended."""

    part: str
    status: str  # ok, failed, timed out, skipped
    reason: str
    seconds: float
    output: list[str]


def run_part(part: Part, on_result: Callable[[dict[str, object]], None], echo: Callable[[str], None] = print) -> Outcome:
    """Run a part.

    Args:
        part: to run.
        on_result: called with each result when it is reported.
        echo: called with each other line of output.
    """
    if reason := part.skipped or _missing(part):
        return {"part": part.name, "status": "skipped", "reason": reason}
    began, last, skipped = time.monotonic(), deque[str](maxlen=LAST_LINES), list[str]()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command_line(part), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip

    def read() -> None:
        assert process.stdout is not None
        for line in map(str.rstrip, process.stdout):
            if line.startswith(RESULT):
                on_result(json.loads(line.removeprefix(RESULT)))
            elif line.startswith(SKIPPED):
                skipped.append(line.removeprefix(SKIPPED))
            else:
                last.append(line)
                echo(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    timed_out = not _ends_within(process, part.limit)
    _kill_group(process.pid)  # also what a part has left behind, such as a server
    process.wait()
    reader.join(10)
    outcome: Outcome = {"part": part.name, "status": "ok", "seconds": round(time.monotonic() - began, 1)}
    if timed_out:
        outcome |= {"status": "timed out", "reason": f"killed after {part.limit:.0f} s", "output": list(last)}
    elif process.returncode != 0:
        outcome |= {"status": "failed", "reason": _reason(process.returncode, last), "output": list(last)}
    elif skipped:
        outcome |= {"status": "skipped", "reason": skipped[-1]}
    return outcome


def _missing(part: Part) -> str:
    missing = [name for name in part.needs if find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def _ends_within(process: subprocess.Popen[str], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    except KeyboardInterrupt:
        _kill_group(process.pid)
        raise
    return True


def _kill_group(group: int) -> None:
    """End a process group: first by SIGTERM, on which torchrun ends its ranks and a server its workers."""
    for number, wait in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 0.0)):
        with suppress(ProcessLookupError):
            os.killpg(group, number)
            end = time.monotonic() + wait
            while time.monotonic() < end:
                os.killpg(group, 0)  # raises when nothing is left
                time.sleep(0.1)


def _reason(code: int, last: deque[str]) -> str:
    """The exit code, and the last line that is not empty."""
    line = next((line for line in reversed(last) if line.strip()), "no output")
    return f"exit code {code}: {line[:300]}"
