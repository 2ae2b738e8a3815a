"""The subprocess of a dry run: ``python -m bumblebee.preview.dry_run_process``.

It reads the arguments of ``run_steps`` as JSON from stdin, builds the recipe like a training run, and writes one line that
begins with ``RESULT`` or ``REFUSED``. It has one rank, no callbacks, and a temporary output folder.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module

import torch

from bumblebee.datamodule import Batch
from bumblebee.distributed.process_group import pick_device
from bumblebee.hardware.memory_stats import max_memory_allocated, memory_allocated, reset_peak_memory_stats
from bumblebee.preview.data_subset import DataSubset
from bumblebee.preview.dry_run import MAX_MICRO_BATCHES, REFUSED, RESULT, DryRunResult
from bumblebee.recipe import Run, build, recipe_parser
from bumblebee.trainer import Trainer
from bumblebee.utils.shared_packages import prefer_ours

TIMING_BUDGET = 10.0  # seconds in which steps are repeated


def run_steps(recipe: str, micro_batches: float, imports: list[str]) -> DryRunResult:
    """Build the recipe, run the steps and measure them.

    Args:
        recipe: the resolved recipe, as YAML.
        micro_batches: per step, on average.
        imports: modules that building the recipe has imported; imported before measuring.
    """
    config = recipe_parser().parse_string(recipe)
    with tempfile.TemporaryDirectory() as folder:
        device = pick_device(config.trainer.device)
        _import_all(device, imports)
        baseline = memory_allocated(device)
        reset_peak_memory_stats(device)
        run = build(config)
        try:
            step_seconds, first = _train(run, folder, micro_batches)
            peak = max_memory_allocated(device) - baseline
        finally:
            run.trainer.close()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return DryRunResult(peak, baseline, step_seconds, first)


def _import_all(device: torch.device, imports: list[str]) -> None:
    """Import what training imports, so that modules do not count as memory of the run."""
    import bumblebee.checkpoint.model_files
    import bumblebee.training.setup  # noqa: F401
    from bumblebee.distributed.deepspeed.operators import import_deepspeed

    import_deepspeed(device)
    for name in imports:
        with suppress(Exception):  # a missing module fails later with a clearer error
            import_module(name)
    gc.collect()


def _train(run: Run, folder: str, micro_batches: float) -> tuple[list[float], float]:
    """Durations of typical steps, and of the first step, in seconds."""
    trainer = run.trainer
    trainer.resume = None
    if hasattr(run.task, "cache_dir"):  # results precomputed for these few samples are useless to the training run
        run.task.cache_dir = folder
    subset = DataSubset(run.data, trainer.micro_batch_size, run.seed)
    trainer.setup(run.task, subset, run.optimizer, run.schedule, {}, f"{folder}/run", run.seed)
    largest, *typical = subset.batches()
    count = min(math.ceil(micro_batches), MAX_MICRO_BATCHES)
    first = _seconds(trainer, [*typical[: count - 1], largest])
    second = _seconds(trainer, [*typical[: count - 1], largest])  # with the optimizer's state allocated
    step_seconds: list[float] = []
    deadline = time.perf_counter() + TIMING_BUDGET
    while not step_seconds or (len(step_seconds) < 4 and time.perf_counter() + second < deadline):
        step_seconds.append(_whole_step_seconds(trainer, typical[:count], micro_batches))
    trainer.check_finite()
    return step_seconds, first


def _whole_step_seconds(trainer: Trainer, window: list[Batch], micro_batches: float) -> float:
    """Duration of a step, extrapolated to ``micro_batches`` micro-batches."""
    seconds = _seconds(trainer, window)
    missing = micro_batches - len(window)
    if missing == 0 or len(window) == 1:
        return seconds
    return seconds + missing * max(0.0, seconds - _seconds(trainer, window[:1])) / (len(window) - 1)


def _seconds(trainer: Trainer, window: list[Batch]) -> float:
    began = time.perf_counter()
    trainer.train_step(*trainer.task.prepare_windows([window], trainer.step))
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return time.perf_counter() - began


def main() -> None:
    """Run the job from stdin."""
    prefer_ours()
    try:
        line = RESULT + json.dumps(asdict(run_steps(**json.load(sys.stdin))))
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        line = REFUSED + json.dumps(str(error))
    print(line, flush=True)


if __name__ == "__main__":
    main()
