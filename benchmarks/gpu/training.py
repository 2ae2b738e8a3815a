"""Training of nanochat's d20 shape (561 M parameters) through the Trainer: tokens/s, MFU, predicted and measured memory.

    python -m benchmarks.gpu.training --device cuda [--attention varlen] [--compile] [--stage 2] ...

Under torchrun the ranks train together. ``--raise_at`` and ``--report_ranks`` serve ``several.py``.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.results import report, skip
from benchmarks.gpu.shapes import TRAINING, TrainingShape, model_config
from bumblebee.callback import Callback
from bumblebee.datamodule import Batch, DataModule
from bumblebee.hardware import flops
from bumblebee.nn.attention_kernels import problems, select_kernel

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer


class PackedRows(DataModule[int]):
    """Random tokens in rows of packed documents of equal length."""

    def __init__(self, shape: TrainingShape, samples: int, vocabulary: int) -> None:
        self.shape, self.samples, self.vocabulary = shape, samples, vocabulary

    def setup(self, seed: int) -> None:
        """Draw the rows, the same in every run."""
        length = self.shape.length
        tokens = torch.randint(self.vocabulary, (self.samples, length + 1), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(length).expand(self.samples, length) % (length // self.shape.documents)
        self.columns = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": positions}
        self.train = range(self.samples)

    def collate(self, samples: list[int]) -> Batch:
        """Return the rows with these indices as a micro-batch."""
        return {name: column[samples].contiguous() for name, column in self.columns.items()}


class Timer(Callback):
    """Times steps until the device has finished them, raises on request, and lets others know the ranks' process ids."""

    def __init__(self, options: argparse.Namespace, warm_up: int) -> None:
        self.options, self.warm_up, self.seconds = options, warm_up, list[float]()
        self.losses = list[float]()

    def on_fit_start(self, trainer: Trainer) -> None:
        """Report the step at which the run starts."""
        if self.options.report_ranks:
            report(rank=int(os.environ.get("RANK", "0")), process=os.getpid(), starts_at=trainer.step)

    def on_step_start(self, trainer: Trainer) -> None:
        """Start the clock when the device is idle."""
        if self.options.raise_at == trainer.step and int(os.environ.get("RANK", "0")) == 1:
            raise RuntimeError(f"raised on rank 1 at step {trainer.step} on purpose")
        _synchronize(trainer.device)
        self.began = time.perf_counter()

    def on_step_end(self, trainer: Trainer) -> None:
        """Stop it."""
        _synchronize(trainer.device)
        self.seconds.append(time.perf_counter() - self.began)
        if self.options.report_ranks:
            report(rank=int(os.environ.get("RANK", "0")), step=trainer.step)
        time.sleep(self.options.pause)

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Keep the loss."""
        self.losses.append(metrics["loss"])

    @property
    def median(self) -> float:
        """Median seconds of the timed steps; of all if the run was resumed near its end."""
        return statistics.median(self.seconds[self.warm_up :] or self.seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(options: argparse.Namespace, shape: TrainingShape) -> None:
    """Train and report."""
    from bumblebee import Bumblebee, LanguageModeling, Trainer
    from bumblebee.transforms import Compile
    from callbacks import Checkpoint

    timer = Timer(options, shape.warm_up)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = Trainer(
        max_steps=options.steps or shape.steps, micro_batch_size=options.rows or shape.rows, accumulate=shape.accumulate,
        precision=options.precision, zero_stage=options.stage, device=options.device, resume=options.resume,
    )  # fmt: skip
    config = model_config("d20", options.device)
    with trainer.building():
        torch.manual_seed(0)
        model = Bumblebee(config, attention=options.attention)
    weight_flops = flops.weight_flops_per_token(model)
    predicted = predicted_gb(model, options, shape, ranks)
    task = LanguageModeling(model, [Compile()] if options.compile else None)
    rows = trainer.micro_batch_size * shape.accumulate
    data = PackedRows(shape, rows * ranks * trainer.max_steps, config.vocab_size)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-4, fused=True)
    callbacks: dict[str, Callback | None] = {"timer": timer}
    if options.save_every:
        callbacks["checkpoint"] = Checkpoint(every=options.save_every, keep=2)
    with tempfile.TemporaryDirectory() as temporary:
        trainer.fit(task, data, optimizer, None, callbacks, options.output_dir or Path(temporary) / "run", 1)
    if int(os.environ.get("RANK", "0")) == 0:
        # Attention is counted within documents, so that packing does not inflate the MFU.
        per_token = weight_flops + flops.attention_flops_per_token(model, shape.length // shape.documents)
        tokens = rows * shape.length * ranks
        rate = tokens / timer.median
        report(
            variant=options.variant, ranks=ranks, stage=options.stage, precision=options.precision, compiled=options.compile,
            attention=select_kernel(options.attention, torch.bfloat16), tokens_per_s=rate, step_s=timer.median,
            slowest_step_s=max(timer.seconds[shape.warm_up :] or timer.seconds), loss=timer.losses[-1],
            tflops=rate * per_token / ranks / 1e12, **utilization(rate * per_token / ranks, options),
            predicted_gb=predicted, measured_gb=measured_gb(options.device),
        )  # fmt: skip


def utilization(flops_per_s: float, options: argparse.Namespace) -> dict[str, float | str | None]:
    """MFU, and what it is relative to: the data sheet's peak of the GPU; on a CPU, and for unknown GPUs, a measured product."""
    if options.device == "cuda" and (peak := flops.peak_tflops(torch.cuda.get_device_name())) is not None:
        return {"mfu": flops_per_s / peak / 1e12, "peak_tflops": peak, "peak": "data sheet"}
    from benchmarks.kernels.harness import measure_peaks

    peak = measure_peaks(torch.device(options.device), torch.bfloat16).flops / 1e12
    return {"mfu": flops_per_s / peak / 1e12, "peak_tflops": peak, "peak": "measured"}


def predicted_gb(model: torch.nn.Module, options: argparse.Namespace, shape: TrainingShape, ranks: int) -> float:
    """The memory that ``bumblebee preview`` predicts for a device, in GB."""
    from bumblebee.preview.memory_estimate import BatchShape, ModelSize, TrainingSetup, estimate_memory

    rows = options.rows or shape.rows
    kernel = select_kernel(options.attention, torch.bfloat16 if options.precision != "fp32" else torch.float32)
    setup = TrainingSetup(options.precision, options.stage, ranks, options.device)
    return estimate_memory(ModelSize.of(model), setup, BatchShape(rows, shape.length, rows * shape.length, kernel)).total / 1e9


def measured_gb(device: str) -> float | None:
    """Peak memory that torch allocated on the GPU, in GB."""
    return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--variant", default="", help="name in the report")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--stage", type=int, choices=[0, 1, 2, 3], default=1)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="bf16")
    parser.add_argument("--rows", type=int, help="of a micro-batch")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--output_dir")
    parser.add_argument("--save_every", type=int)
    parser.add_argument("--resume")
    parser.add_argument("--raise_at", type=int, default=-1, help="step at which rank 1 raises")
    parser.add_argument("--report_ranks", action="store_true", help="process id and steps of each rank")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds after each step, so that it can be interrupted")
    return parser


def main() -> None:
    options = arguments().parse_args()
    if options.attention != "auto" and (reasons := problems(options.attention, torch.bfloat16)):
        skip("; ".join(reasons))
    if options.compile and options.device == "cpu":
        import shutil

        if not (shutil.which("g++") or shutil.which("clang++")):
            skip("torch.compile needs a C++ compiler on a CPU")
    train(options, TRAINING[options.device])


if __name__ == "__main__":
    sys.exit(main())
