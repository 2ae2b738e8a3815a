"""Measure everything that only a GPU can show: python -m benchmarks.gpu [--only PART ...] [--resume] [--device cpu]

Parts: environment, a probe of torch's attention, the GPU tests, ``bumblebee verify`` over precisions and stages, training,
decoding, nano-vllm's benchmark, serving, and the kernel benchmarks. Each is a process with a time limit; its results are
appended to gpu-NAME.jsonl and gpu-NAME.md as they come. What cannot run is skipped with the reason. With ``--device cpu``
the same parts run with small shapes, as a test of the command; those figures mean nothing.

Exit code: 0 if no part failed or timed out, 1 otherwise, 2 for options that cannot be used.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from benchmarks.common import commit, processor
from benchmarks.gpu.environment import installed
from benchmarks.gpu.parts import ROOT, Part, all_parts, select
from benchmarks.gpu.report import Records, targets_table
from benchmarks.gpu.runner import run_part

DRY_RUN = Path("runs") / "gpu-dry-run"  # where a CPU's results go: they are no measurements


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = arguments()
    options = parser.parse_args(argv)
    device = usable_device(parser, options.device)
    folder = Path(options.output or (ROOT / "benchmarks" / "results" if device == "cuda" else DRY_RUN))
    try:
        parts = select(all_parts(device, folder.absolute()), options.only)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print("\n".join(f"{part.name}  (at most {part.limit:.0f} s)" for part in parts))
        return 0
    return run(parts, Records(folder, options.name or default_name(device), origin(device)), options.resume)


def run(parts: Sequence[Part], records: Records, resume: bool) -> int:
    """Run parts one after another, and print the targets at the end."""
    finished = records.finished() if resume else set()
    failed = []
    for number, part in enumerate(parts, start=1):
        if part.name in finished:
            print(f"[{number}/{len(parts)}] {part.name}: done before", flush=True)
            continue
        print(f"[{number}/{len(parts)}] {part.name} (at most {part.limit:.0f} s)", flush=True)
        records.append(part=part.name, begins=True)
        outcome = run_part(part, lambda result: show(part, result, records), lambda line: print(f"    {line}", flush=True))  # noqa: B023
        records.append(**outcome)
        print(f"    {outcome['status']}{': ' + outcome['reason'] if 'reason' in outcome else ''}", flush=True)
        failed += [part.name] if outcome["status"] in ("failed", "timed out") else []
    print(f"\n{targets_table(records.read())}\n\nwrote {records.page} and {records.lines}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def show(part: Part, result: dict[str, object], records: Records) -> None:
    """Print a result and append it."""
    print(
        "    "
        + ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in result.items())
    )
    records.append(part=part.name, result=result)


def usable_device(parser: argparse.ArgumentParser, name: str) -> str:
    """The device; ends with an error if there is no GPU and the CPU was not asked for."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        parser.error("--device: cuda, but no GPU is visible; --device cpu tries the command with small shapes")
    return name


def default_name(device: str) -> str:
    """Name of the result files: that of the GPU, such as nvidia-h100-80gb-hbm3."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def origin(device: str) -> dict[str, str]:
    """Hardware, versions, commit and date of the records."""
    import torch

    hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if device == "cuda" else processor()
    return {
        "kind": device, "device": hardware, "torch": torch.__version__, "deepspeed": installed("deepspeed") or "none",
        "python": platform.python_version(), "commit": commit() or "unknown", "date": str(date.today()),
    }  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts, or beginnings of their names, such as decode")
    parser.add_argument("--resume", action="store_true", help="leave out parts that were ok at this commit on this hardware")
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    parser.add_argument("--name", help="of the result files; default: that of the GPU")
    parser.add_argument("--output", help=f"folder of the results; default: benchmarks/results, with --device cpu {DRY_RUN}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
