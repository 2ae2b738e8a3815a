"""The parts of the GPU benchmark, in the order of their importance: each a command with a time limit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.shapes import BATCHES

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Part:
    """One process of the benchmark.

    Args:
        name: in the report and after --only.
        command: after ``python``.
        limit: seconds after which it is killed.
        needs: modules without which it is skipped.
        skipped: why it is not run; empty if it is.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ()
    skipped: str = ""


def all_parts(device: str, results: Path) -> tuple[Part, ...]:
    """The parts for ``cuda``, or the same on a CPU with small shapes.

    Args:
        device: cpu or cuda.
        results: folder of results, for the figures and plots of the kernel benchmarks.
    """
    return (
        _own("environment", "environment", device, 90),
        _own("probe", "probe", device, 180),
        _training("default", device, 240),
        _decode(1, device, 180),
        Part("tests", _gpu_tests(device), 420, ("pytest", "deepspeed")),
        *(_verify("bf16", stage, device) for stage in (1, 0, 2, 3)),
        _training("compiled", device, 420, "--compile"),
        *(_decode(batch, device, 180) for batch in BATCHES if batch != 1),
        _own("offline", "offline", device, 600),
        _training("varlen", device, 240, "--attention", "varlen"),
        _training("varlen-compiled", device, 420, "--attention", "varlen", "--compile"),
        *(
            part
            for kernel in ("flash", "flash3")
            for part in (
                _training(kernel, device, 240, "--attention", kernel),
                _training(f"{kernel}-compiled", device, 420, "--attention", kernel, "--compile"),
            )
        ),
        _own("serving", "serving", device, 420, needs=("litserve", "httpx")),
        Part("kernels", _kernels(device, results), 600),
        _training("sdpa", device, 240, "--attention", "sdpa"),
        *(_training(f"stage-{stage}", device, 240, "--stage", str(stage)) for stage in (0, 2, 3)),
        _training("one-row", device, 240, "--rows", "1"),
        _training("fp16-stage-2", device, 240, "--precision", "fp16", "--stage", "2", on_cpu="fp16 needs a GPU"),
        _verify("fp16", 2, device),
        _verify("fp32", 1, device),
        _decode(64, device, 180, "sampled", "--temperature", "0.7"),
    )


def select(parts: Sequence[Part], names: Sequence[str] | None) -> list[Part]:
    """The parts with these names or beginnings of names; all for None.

    Raises:
        ValueError: a name is that of no part.
    """
    if names is None:
        return list(parts)
    for name in names:
        if not any(part.name.startswith(name) for part in parts):
            raise ValueError(f"--only: unknown part {name!r}; available: {', '.join(part.name for part in parts)}")
    exact = {part.name for part in parts}
    return [part for part in parts if any(part.name == n or (n not in exact and part.name.startswith(n)) for n in names)]


def _own(
    name: str, module: str, device: str, limit: float, *words: str, needs: tuple[str, ...] = (), skipped: str = ""
) -> Part:
    return Part(name, ("-m", f"benchmarks.gpu.{module}", "--device", device, *words), limit, needs, skipped)


def _training(variant: str, device: str, limit: float, *words: str, on_cpu: str = "") -> Part:
    skipped = on_cpu if device == "cpu" else ""
    words = ("--variant", variant, *words)
    return _own(f"train-{variant}", "training", device, limit, *words, needs=("deepspeed",), skipped=skipped)


def _decode(batch: int, device: str, limit: float, variant: str = "", *words: str) -> Part:
    name = "-".join(filter(None, ["decode", str(batch), variant]))
    return _own(name, "decode", device, limit, "--batch", str(batch), *words)


def _verify(precision: str, stage: int, device: str) -> Part:
    """On a CPU one of them: the others run the same code, and each takes a minute or two."""
    skipped = "" if device == "cuda" or (precision, stage) == ("bf16", 1) else "on a CPU only verify-bf16-1 is run"
    words = ("--precision", precision, "--zero_stage", str(stage))
    name = f"verify-{precision}-{stage}"
    return _own(name, "verification", device, 300, *words, needs=("deepspeed",), skipped=skipped)


def _gpu_tests(device: str) -> tuple[str, ...]:
    """The tests with the marker gpu. Only their files are collected: the others take a while to import."""
    files = sorted(
        str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text()
    )
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *files)
    return words if device == "cuda" else (*words[: -len(files)], "tests/nn/test_attention_kernels.py")


def _kernels(device: str, results: Path) -> tuple[str, ...]:
    """All kernels on a GPU; two small ones on a CPU, whose own figures are those of ``python -m benchmarks.kernels``."""
    words = ("-m", "benchmarks.kernels", "--device", device, "--output", str(results / "kernels"))
    return words if device == "cuda" else (*words, "--only", "rms_norm", "swiglu", "--sizes", "8x16", "--rounds", "1")


def command_line(part: Part) -> list[str]:
    """The command of a part."""
    return [sys.executable, *part.command]
