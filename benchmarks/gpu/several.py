"""Several GPUs: python -m benchmarks.gpu.several [--ranks N] [--only PART ...] [--device cpu]

One process per rank under torchrun, with NCCL (with ``--device cpu`` two ranks with gloo and a small model):

- ``verify-stage-S``: ``bumblebee verify`` on all ranks at stages 1 to 3.
- ``scaling-stage-S``: tokens/s of N ranks over N times those of one rank, with the same micro-batches on each rank.
- ``raise``: a rank raises; all ranks must exit within a limit, and its message must be printed.
- ``kill``: a rank is killed (SIGKILL) after a checkpoint; the others must exit within a limit, and ``--resume auto`` must
  continue.

Results are appended to gpu-NAME-xN.jsonl and .md. Exit code as of ``python -m benchmarks.gpu``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu.__main__ import DRY_RUN, default_name, origin, run, usable_device
from benchmarks.gpu.parts import ROOT, Part, select
from benchmarks.gpu.report import Records
from benchmarks.gpu.results import RESULT, report

EXIT = 90.0  # seconds in which all ranks must have exited after one of them ended
STEPS, SAVE_AT, STOPPED_AT = 8, 2, 3  # of the runs that are interrupted
Result = dict[str, object]


def all_parts(device: str, ranks: int) -> tuple[Part, ...]:
    """The parts for a number of ranks."""
    own = ("-m", "benchmarks.gpu.several", "--device", device, "--ranks", str(ranks), "--run")
    verify = launcher(ranks)[1:] + ("-m", "bumblebee", "verify", "--device", device, "--folder", tempfile.gettempdir())
    # On a CPU each verification takes minutes, and the tests of verify run it on two ranks.
    skipped = "on a CPU it is part of the tests" if device == "cpu" else ""
    return (
        Part("raise", (*own, "raise"), 240, ("deepspeed",)),
        Part("kill", (*own, "kill"), 420, ("deepspeed",)),
        *(Part(f"scaling-stage-{stage}", (*own, f"scaling-{stage}"), 480, ("deepspeed",)) for stage in (1, 2, 3)),
        *(
            Part(f"verify-stage-{stage}", (*verify, "--zero_stage", str(stage)), 420, ("deepspeed",), skipped)
            for stage in (1, 2, 3)
        ),
    )


def launcher(ranks: int) -> tuple[str, ...]:
    """torchrun on this machine; standalone picks a free port."""
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks))


class Ranks:
    """A training under torchrun, whose output is read while it runs."""

    def __init__(self, device: str, ranks: int, *words: str) -> None:
        command = [*launcher(ranks), "-m", "benchmarks.gpu.training", "--device", device, *words]
        if ranks == 1:
            command = [sys.executable, "-m", "benchmarks.gpu.training", "--device", device, *words]
        self.results: list[Result] = []
        self.output: list[str] = []
        self.left: list[int] = []  # ranks that still ran when the launcher had ended
        self.changed = threading.Condition()
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self.changed:
                self.output.append(line.rstrip())
                if RESULT in line:  # lines of two ranks may follow each other without a line break
                    self.results += [json.loads(text) for text in line.split(RESULT)[1:]]
                else:
                    print(line, end="", flush=True)
                self.changed.notify_all()

    def wait_for(self, matches: Callable[[Result], bool], seconds: float) -> Result:
        """The first result that matches.

        Raises:
            RuntimeError: there was none in this time.
        """
        with self.changed:
            if not self.changed.wait_for(lambda: any(map(matches, self.results)), seconds):
                self.kill()
                raise RuntimeError(f"the training did not get as far within {seconds:.0f} s")
            return next(filter(matches, self.results))

    def exit_code(self, seconds: float) -> int | None:
        """The launcher's exit code; None if it still ran after this time, and was killed with all ranks."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.left = self.alive()
            self.kill()
            self.reader.join(10)
        return self.process.returncode

    def kill(self) -> None:
        """End what is left. torchrun gives each rank a session of its own, and ends the ranks on SIGTERM."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        self.process.kill()
        for rank in self.alive():
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)

    def alive(self) -> list[int]:
        """Process ids of ranks that still run."""
        ids = {int(str(result["process"])) for result in self.results if "process" in result}
        return sorted(id for id in ids if _runs(id))


def _runs(process: int) -> bool:
    """Whether a process runs. A zombie does not: its launcher has ended and nobody has waited for it yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def raise_on_one_rank(device: str, ranks: int) -> bool:
    """Rank 1 raises at a step."""
    training = Ranks(device, ranks, "--steps", str(STEPS), "--raise_at", str(STOPPED_AT), "--report_ranks")
    training.wait_for(lambda result: result.get("step") == STOPPED_AT, 280)
    began = time.monotonic()
    code = training.exit_code(EXIT)
    message = f"raised on rank 1 at step {STOPPED_AT} on purpose"
    printed = any(message in line for line in training.output)
    passed = code not in (None, 0) and printed and not training.left
    report(exit_code=code, seconds=time.monotonic() - began, limit_s=EXIT, message_printed=printed,
           processes_left=training.left, passed=passed)  # fmt: skip
    return passed


def kill_one_rank(device: str, ranks: int) -> bool:
    """Rank 1 is killed after a checkpoint, and the run is resumed."""
    with tempfile.TemporaryDirectory() as folder:
        words = (
            "--output_dir",
            str(Path(folder) / "run"),
            "--save_every",
            str(SAVE_AT),
            "--steps",
            str(STEPS),
            "--report_ranks",
        )
        training = Ranks(device, ranks, *words, "--pause", "1")
        training.wait_for(lambda result: result.get("step") == STOPPED_AT and result["rank"] == 1, 280)
        victim = training.wait_for(lambda result: result.get("rank") == 1 and "process" in result, 1)
        os.kill(int(str(victim["process"])), signal.SIGKILL)
        began = time.monotonic()
        code = training.exit_code(EXIT)
        seconds, left = time.monotonic() - began, training.left
        report(exit_code=code, seconds=seconds, limit_s=EXIT, processes_left=left)
        resumed = Ranks(device, ranks, *words, "--resume", "auto")
        resumed_code = resumed.exit_code(200)
    starts = [result["starts_at"] for result in resumed.results if "starts_at" in result]
    last = max((int(str(result["step"])) for result in resumed.results if "step" in result), default=0)
    # A checkpoint of step 2 is complete when step 3 is reported; one of a later step may be.
    continued = resumed_code == 0 and len(starts) == ranks and min(map(int, map(str, starts))) >= SAVE_AT and last == STEPS
    report(resumed_exit_code=resumed_code, resumed_at=starts, last_step=last, continued=continued)
    return code not in (None, 0) and not left and continued


def scaling(device: str, ranks: int, stage: int) -> bool:
    """Efficiency of N ranks: 1 if each is as fast as one alone."""
    rates = []
    for count in (1, ranks):
        training = Ranks(device, count, "--stage", str(stage), "--variant", f"{count} ranks")
        code = training.exit_code(220)
        figures = next((result for result in training.results if "tokens_per_s" in result), None)
        if code != 0 or figures is None:
            return False
        report(
            **{name: figures[name] for name in ("ranks", "stage", "attention", "tokens_per_s", "step_s", "mfu", "measured_gb")}
        )
        rates.append(float(str(figures["tokens_per_s"])))
    report(stage=stage, ranks=ranks, scaling_efficiency=rates[1] / (ranks * rates[0]))
    return True


def run_one(name: str, device: str, ranks: int) -> int:
    """Run a part in this process; used by the command itself."""
    kind, _, stage = name.partition("-")
    if kind == "scaling":
        return int(not scaling(device, ranks, int(stage)))
    return int(not {"raise": raise_on_one_rank, "kill": kill_one_rank}[kind](device, ranks))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.several", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--ranks", type=int, help="default: the number of GPUs; on a CPU 2")
    parser.add_argument("--only", nargs="+", metavar="PART")
    parser.add_argument("--resume", action="store_true", help="leave out parts that were ok at this commit on this hardware")
    parser.add_argument("--name", help="of the result files; default: that of the GPU")
    parser.add_argument("--output", help=f"folder of the results; default: benchmarks/results, with --device cpu {DRY_RUN}")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    device = usable_device(parser, options.device)
    ranks = options.ranks or number_of_ranks(device)
    if ranks < 2:
        parser.error(f"--ranks: at least 2, got {ranks}; for one GPU run python -m benchmarks.gpu")
    if options.run:
        return run_one(options.run, device, ranks)
    try:
        parts = select(all_parts(device, ranks), options.only)
    except ValueError as error:
        parser.error(str(error))
    folder = Path(options.output or (ROOT / "benchmarks" / "results" if device == "cuda" else DRY_RUN))
    return run(parts, Records(folder, f"{options.name or default_name(device)}-x{ranks}", origin(device)), options.resume)


def number_of_ranks(device: str) -> int:
    """The number of GPUs; 2 on a CPU."""
    import torch

    return torch.cuda.device_count() if device == "cuda" else 2


if __name__ == "__main__":
    sys.exit(main())
