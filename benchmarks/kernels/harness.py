"""Shared by the kernel benchmarks: compare every variant with a formula, time those that are right, and report.

A script describes its kernel as cases, inputs of one size with the variants that can compute them, and calls ``main``. A
variant whose output or gradients differ from the formula in fp64 is not timed, and the exit code is 1. The same holds for one
that raises another error than those of ``refusal``. Variants run in turn, so that other load disturbs all of them alike; the
figures are medians, with half the distance of the quartiles beside them.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import commit, header, processor, table
from bumblebee.hardware.cuda import configure_cuda
from bumblebee.verify.checks import machine_throughput
from bumblebee.verify.checks.machine_throughput import duration
from bumblebee.verify.checks.tolerances import relative_error, rounding_unit
from bumblebee.verify.context import DTYPES, Context
from bumblebee.verify.verify_options import VerifyOptions

RESULTS = Path(__file__).parents[1] / "results"
BOUND = 4.0  # rounding units of a whole output or gradient
Variant = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One size of a kernel.

    Args:
        name: shown in the table.
        inputs: arguments of the variants; those that require a gradient are differentiated.
        formula: computes the output from the inputs in fp64.
        variants: by name.
        unavailable: why other variants cannot run here, by name.
        flops: of a forward pass; 0 for a kernel that is bound by memory.
        bytes: that a forward pass must read and write at least; 0 for one that is bound by arithmetic.
        backward_work: work of forward and backward together, in forward passes.
        dtype: of the arithmetic, which the bound of the error follows; None for the run's.
    """

    name: str
    inputs: tuple[Tensor, ...]
    formula: Variant
    variants: dict[str, Variant]
    unavailable: dict[str, str] = field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0
    backward_work: float = 3.0
    dtype: torch.dtype | None = None

    @property
    def has_backward(self) -> bool:
        """Whether any input is differentiated."""
        return any(tensor.requires_grad for tensor in self.inputs)


@dataclass(frozen=True)
class Peaks:
    """What the machine reaches in the same run: FLOPs per second of a matmul in the dtype, and bytes per second of a copy."""

    flops: float
    bytes: float


Cases = Callable[[torch.device, torch.dtype, str], Iterator[Case]]


def main(title: str, cases: Cases, sizes: dict[str, Sequence[str]], argv: Sequence[str] | None = None) -> int:
    """Run a kernel's benchmark and return the exit code.

    Args:
        title: of the report; its first word is the name of the plot.
        cases: yields the cases of a device, dtype and size.
        sizes: the default sizes by device type.
        argv: the command line.
    """
    options = _options(title, sizes, argv)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    configure_cuda(device)
    torch.manual_seed(0)
    print(header(f"{title}, {options.dtype} on {device.type}"), flush=True)
    peaks = measure_peaks(device, dtype)
    print(f"Peaks of this run: {peaks.flops / 1e12:.3g} TFLOP/s (matmul), {peaks.bytes / 1e9:.3g} GB/s (copy)\n", flush=True)
    rows, wrong = [], False
    for size in options.sizes or sizes[device.type]:
        for case in cases(device, dtype, size):
            results = run_case(case, dtype, options.rounds, peaks)
            wrong |= any("failed" in result or ("error" in result and not _is_right(result)) for result in results)
            rows += [{**result, "kernel": title.split()[0].lower(), "dtype": options.dtype} for result in results]
    print(report(rows))
    if options.output:
        write(Path(options.output), rows, device)
    return int(wrong)


def run_case(case: Case, dtype: torch.dtype, rounds: int, peaks: Peaks) -> list[dict[str, object]]:
    """One result for each variant: its error, and its times if it is right; why it cannot run; or what it raised."""
    bound = BOUND * rounding_unit(case.dtype or dtype)
    errors, missing, failed = {}, dict(case.unavailable), {}
    for name, variant in case.variants.items():
        try:
            errors[name] = error_of(case, variant)
        except Exception as error:  # a fault of one variant must not hide the others
            (missing if refusal(error) else failed)[name] = refusal(error) or _one_line(error)
    right = {name: case.variants[name] for name, error in errors.items() if error <= bound}
    timed = times(case, right, rounds)
    results: list[dict[str, object]] = []
    for name, error in errors.items():
        figures = {
            key: value for kind, values in timed.get(name, {}).items() for key, value in _figures(case, kind, values, peaks)
        }
        results.append({"case": case.name, "variant": name, "error": error, "bound": bound, **figures})
    results += [{"case": case.name, "variant": name, "failed": message} for name, message in failed.items()]
    return results + [{"case": case.name, "variant": name, "unavailable": reason} for name, reason in missing.items()]


def refusal(error: Exception) -> str | None:
    """Why a variant cannot run here, if the error says so; None for any other error, which is a fault.

    A package or an implementation is missing, the memory does not suffice, or SDPA has no kernel of the requested backend.
    """
    if isinstance(error, ImportError | NotImplementedError | torch.OutOfMemoryError):
        return _one_line(error) if isinstance(error, torch.OutOfMemoryError) else str(error).splitlines()[0]
    message = str(error)
    return message.splitlines()[0] if isinstance(error, RuntimeError) and "No available kernel" in message else None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _is_right(result: dict[str, object]) -> bool:
    """Whether the error is within the bound; NaN is not."""
    return float(result["error"]) <= float(result["bound"])  # type: ignore[arg-type]


def error_of(case: Case, variant: Variant) -> float:
    """The largest relative error of output and gradients against the formula in fp64."""
    computed = _results(variant, case.inputs)
    exact = _results(case.formula, tuple(_double(tensor) for tensor in case.inputs))
    return max(relative_error(a.double(), b) for a, b in zip(computed, exact, strict=True))


def _double(tensor: Tensor) -> Tensor:
    copy = tensor.detach().double() if tensor.is_floating_point() else tensor
    return copy.requires_grad_(tensor.requires_grad)


def _results(variant: Variant, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Output, and gradients of its product with fixed random numbers."""
    out = variant(*inputs)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    if not wanted:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, wanted, _gradient_of(out))]


def _gradient_of(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=generator).to(out.device, torch.bfloat16).to(out.dtype)


# -- timing ------------------------------------------------------------------------------------------------------------


def times(case: Case, variants: dict[str, Variant], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of forward passes, and of forward and backward passes, by variant; the variants in turn."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"forward": []} for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            with torch.no_grad():
                forward = seconds_of(lambda: variant(*case.inputs), case.inputs[0].device)  # noqa: B023
            both = seconds_of(lambda: _step(variant, case.inputs), case.inputs[0].device) if case.has_backward else None  # noqa: B023
            if number:  # the first round is a warm-up
                seconds[name]["forward"].append(forward)
                if both is not None:
                    seconds[name].setdefault("forward_backward", []).append(both)
    return seconds


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call on the device: between two events on CUDA, by the clock of the host on a CPU.

    On CUDA a gigabyte is written before the first event. That empties the caches, and while it lasts the host launches the
    call's kernels, whose launches are not measured then.
    """
    if device.type != "cuda":
        return duration(function, device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _filler(device).zero_()
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


@functools.cache
def _filler(device: torch.device) -> Tensor:
    return torch.empty(2**30, dtype=torch.int8, device=device)


def _step(variant: Variant, inputs: tuple[Tensor, ...]) -> None:
    out = variant(*inputs)
    torch.autograd.grad(out, [tensor for tensor in inputs if tensor.requires_grad], torch.ones_like(out))


def _figures(case: Case, kind: str, seconds: list[float], peaks: Peaks) -> Iterator[tuple[str, float]]:
    """Median, quartiles, rate and share of the peak of one kind of pass."""
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    work = 1.0 if kind == "forward" else case.backward_work
    yield f"{kind}_ms", 1e3 * quartiles[1]
    yield f"{kind}_spread_ms", 1e3 * (quartiles[2] - quartiles[0])
    if case.flops:
        yield f"{kind}_tflops", work * case.flops / quartiles[1] / 1e12
        yield f"{kind}_share", work * case.flops / quartiles[1] / peaks.flops
    elif case.bytes:
        yield f"{kind}_gb_per_s", work * case.bytes / quartiles[1] / 1e9
        yield f"{kind}_share", work * case.bytes / quartiles[1] / peaks.bytes


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """The throughputs that ``bumblebee verify`` reports."""
    precision = next(name for name, value in DTYPES.items() if value == dtype)
    context = Context(VerifyOptions(precision=precision), device, Path())  # type: ignore[arg-type]
    (product,), (copy,) = (
        measure(context).measurements for measure in (machine_throughput.matmul_throughput, machine_throughput.memory_bandwidth)
    )
    return Peaks(1e12 * product.value, 1e9 * copy.value)


# -- torch.compile ---------------------------------------------------------------------------------------------------------


def compiled(variant: Variant, device: torch.device) -> tuple[dict[str, Variant], dict[str, str]]:
    """The variant ``compiled``, or why there is none."""
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return {}, {"compiled": "torch.compile needs a C++ compiler on a CPU"}
    return {"compiled": torch.compile(variant, dynamic=False)}, {}


# -- Liger -----------------------------------------------------------------------------------------------------------------


def liger(module: str, name: str, device: torch.device) -> tuple[Callable[..., Any] | None, dict[str, str]]:
    """``apply`` of the autograd function ``name`` of ``liger_kernel.ops.module``, or why there is no variant ``liger``."""
    if device.type != "cuda":
        return None, {"liger": "its Triton kernels need a GPU"}
    try:
        return getattr(import_module(f"liger_kernel.ops.{module}"), name).apply, {}
    except ImportError as error:
        missing = error.name and error.name.startswith("liger_kernel")
        return None, {"liger": "pip install liger-kernel" if missing else f"liger-kernel cannot be imported: {error}"}


# -- output ------------------------------------------------------------------------------------------------------------


def report(rows: Sequence[dict[str, object]]) -> str:
    """A table of all cases, the variants that failed, and those that cannot run."""
    lines = []
    for row in rows:
        if "error" not in row:
            continue
        cells = (
            ["WRONG"] * 4
            if not _is_right(row)
            else [_time(row, "forward"), _rate(row, "forward"), _time(row, "forward_backward"), _rate(row, "forward_backward")]
        )
        lines.append([row["case"], row["variant"], f"{row['error']:.1e}", *cells])
    columns = ["case", "variant", "error", "forward, ms", "share of peak", "forward + backward, ms", "share of peak"]
    missing = {f"{row['variant']}: {row['unavailable']}" for row in rows if "unavailable" in row}
    failed = {f"{row['variant']}: {row['failed']}" for row in rows if "failed" in row}
    notes = [*(f"- FAILED: {line}" for line in sorted(failed)), *(f"- not run: {line}" for line in sorted(missing))]
    return "\n".join([table(columns, lines), "", *notes])


def _time(row: dict[str, object], kind: str) -> str:
    return f"{row[f'{kind}_ms']:.3g} ± {float(row[f'{kind}_spread_ms']) / 2:.2g}" if f"{kind}_ms" in row else ""  # type: ignore[arg-type]


def _rate(row: dict[str, object], kind: str) -> str:
    if f"{kind}_share" not in row:
        return ""
    rate = f"{row[f'{kind}_tflops']:.3g} TFLOP/s" if f"{kind}_tflops" in row else f"{row[f'{kind}_gb_per_s']:.3g} GB/s"
    return f"{row[f'{kind}_share']:.0%} ({rate})"


def write(folder: Path, rows: Sequence[dict[str, object]], device: torch.device) -> None:
    """Append the results to kernels.jsonl, and draw a plot of them."""
    folder.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    origin = {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **_packages(),
        "commit": commit(),
    }
    with (folder / "kernels.jsonl").open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps({**_finite(row), **origin, "date": str(date.today())}) + "\n" for row in rows)
    plot(folder / f"{rows[0]['kernel']}_{rows[0]['dtype']}_{device.type}.png", rows)


def _packages() -> dict[str, str]:
    """Versions of the packages that variants come from, as far as they are installed."""
    installed = {}
    for name in ("triton", "flash-attn", "flash-attn-3", "liger-kernel"):
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def _finite(row: dict[str, object]) -> dict[str, object]:
    """NaN and infinity as null: JSON has neither."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def plot(file: Path, rows: Sequence[dict[str, object]]) -> None:
    """Draw the median time of each variant, a panel for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kind = "forward_backward" if any("forward_backward_ms" in row for row in rows) else "forward"
    timed = [row for row in rows if f"{kind}_ms" in row]
    names = list(dict.fromkeys(str(row["case"]) for row in timed))
    if not names:
        return
    figure, axes = plt.subplots(len(names), 1, figsize=(8, 0.9 + 1.5 * len(names)), squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=True):
        of_case = [row for row in timed if row["case"] == name][::-1]
        bars = axis.barh([str(row["variant"]) for row in of_case], [row[f"{kind}_ms"] for row in of_case], color="#4269d0")
        axis.bar_label(bars, [_rate(row, kind).partition(" ")[0] for row in of_case], padding=3)
        axis.set_title(name, loc="left", fontsize=10)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel(f"{kind.replace('_', ' + ')}, ms (labels: share of the peak)")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _options(title: str, sizes: dict[str, Sequence[str]], argv: Sequence[str] | None) -> argparse.Namespace:
    defaults = "; ".join(f"{device}: {' '.join(names)}" for device, names in sizes.items())
    options = argparse.ArgumentParser(description=title)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.add_argument("--device", choices=["cpu", "cuda"], default=device)
    options.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    options.add_argument("--sizes", nargs="+", metavar="SIZE", help=f"default: {defaults}")
    options.add_argument("--rounds", type=int, default=10, help="timed passes of each variant")
    options.add_argument(
        "--output", default=str(RESULTS / "kernels"), help="folder of kernels.jsonl and plots; '' writes nothing"
    )
    parsed = options.parse_args(sys.argv[1:] if argv is None else argv)
    if parsed.device == "cuda" and not torch.cuda.is_available():
        options.error("--device: cuda, but no GPU is visible")
    return parsed


def dimensions(size: str, names: str) -> list[int]:
    """The numbers of a size such as 4x512x64.

    Raises:
        SystemExit: another number of dimensions.
    """
    try:
        numbers = [int(part) for part in size.split("x")]
    except ValueError:
        numbers = []
    if len(numbers) != len(names.split("x")):
        raise SystemExit(f"--sizes: expected {names}, got {size!r}")
    return numbers
