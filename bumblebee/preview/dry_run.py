"""Rehearsal: a few real optimizer steps in a process of their own, thrown away: how much memory they take, and how long.

The process reads ``run``'s arguments as JSON from its standard input, builds the recipe as a training would, and writes one
line that begins with ``RESULT`` or ``REFUSED``. It has one rank, no callbacks, and a temporary output folder.
"""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from bumblebee.datamodule import Batch, DataModule
from bumblebee.recipe import Run, build, recipe_parser
from bumblebee.shared_packages import prefer_ours
from bumblebee.training.loader import epoch_order

RESULT, REFUSED = "rehearsal: ", "refused: "
MOST = 4  # micro-batches of a step; where a step has more, its time is extrapolated
PATIENCE = 10.0  # seconds in which steps are timed again
LIMIT = 900.0  # seconds for all of it
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


@dataclass(frozen=True)
class Rehearsal:
    """What it found.

    Args:
        peak: bytes held at most, above ``before``.
        before: bytes of a process that has imported everything; 0 on a GPU.
        seconds: of whole optimizer steps.
        first: seconds of the first one, in which kernels may be compiled.
    """

    peak: int
    before: int
    seconds: list[float]
    first: float


class Failed(RuntimeError):
    """It could not be done; says why."""


# -- in this process -----------------------------------------------------------------------------------------------------


def rehearse(recipe: str, micro_batches: float) -> Rehearsal:
    """Start the other process and wait for it.

    Args:
        recipe: the resolved recipe, as YAML.
        micro_batches: of a step on one rank, on average.

    Raises:
        Failed: out of memory, out of time, or an error.
        ValueError: the recipe was refused.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-m", __name__], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    job = {"recipe": recipe, "micro_batches": micro_batches, "imports": [name for name in sys.modules if name != "__main__"]}
    try:
        out, err = process.communicate(json.dumps(job), timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise Failed(f"a few steps take more than {LIMIT:.0f} seconds here") from None
    finally:
        process.kill()
        process.wait()
    for line in out.splitlines():
        if line.startswith(REFUSED):
            raise ValueError(json.loads(line.removeprefix(REFUSED)))
    found = [line for line in out.splitlines() if line.startswith(RESULT)]
    if process.returncode or not found:
        raise Failed(_why(process.returncode, err))
    return Rehearsal(**json.loads(found[-1].removeprefix(RESULT)))


def _why(code: int, err: str) -> str:
    if code < 0:
        return f"the process was ended by signal {-code}, as when memory runs out"
    last = (err.strip().splitlines() or ["no message"])[-1]
    return "not enough memory" if "OutOfMemory" in last or "can't allocate memory" in last else last


# -- in the other process ------------------------------------------------------------------------------------------------


class Few(DataModule):
    """A few samples of a DataModule: those of its largest micro-batch, and of some that stand for the others.

    Args:
        data: the whole.
        size: of a micro-batch.
        seed: of the order.
    """

    def __init__(self, data: DataModule, size: int, seed: int) -> None:
        self.data, self.size, self.seed = data, size, seed

    def setup(self, seed: int) -> None:
        """Choose."""
        self.data.setup(seed)
        self.tokenizer = self.data.tokenizer
        self.places = places(self.data, self.size, self.seed)
        self.train = [self.data.train[index] for index in dict.fromkeys(sum(self.places, []))]  # a pair must not come twice

    def collate(self, samples: list[Any]) -> Batch:
        """As the whole does it."""
        return self.data.collate(samples)

    def without_targets(self, batch: Batch) -> Batch:
        """As the whole does it."""
        return self.data.without_targets(batch)

    def batches(self) -> list[Batch]:
        """Micro-batches: the largest one first."""
        return [self.data.collate([self.data.train[index] for index in place]) for place in self.places]


def places(data: DataModule, size: int, seed: int) -> list[list[int]]:
    """Samples of ``MOST`` micro-batches of the first epoch: the one with the longest sample, then from all over the epoch."""
    order = epoch_order(len(data.train), seed, 0, data.lengths)
    full = max(1, len(order) // size)
    longest = 0 if data.lengths is None else int(data.lengths[order].argmax()) // size
    spread = [(2 * turn + 1) * full // (2 * MOST) for turn in range(MOST)]
    return [order[place * size : (place + 1) * size].tolist() for place in (longest, *spread)]


def run(recipe: str, micro_batches: float, imports: list[str]) -> Rehearsal:
    """Run the steps in this process; ``imports`` are the modules that building the recipe takes."""
    import torch

    from bumblebee.distributed.process_group import pick_device
    from bumblebee.hardware.memory_stats import forget_most, held, most_held

    config = recipe_parser().parse_string(recipe)
    with tempfile.TemporaryDirectory() as folder:
        device = pick_device(config.trainer.device)
        _import_all(device, imports)
        before = held(device)
        forget_most(device)
        parts = build(config)
        try:
            seconds, first = _train(parts, folder, micro_batches)
            peak = most_held(device) - before
        finally:
            parts.trainer.close()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return Rehearsal(peak, before, seconds, first)


def _import_all(device: Any, imports: list[str]) -> None:
    """What training imports, so that it does not count as memory of the model."""
    import bumblebee.checkpoint.hf_folder
    import bumblebee.training.training_state  # noqa: F401
    from bumblebee.distributed.deepspeed.operators import import_deepspeed

    import_deepspeed(device)
    for name in imports:
        with suppress(Exception):  # whatever it is, the recipe's parts tell when they need it
            import_module(name)
    gc.collect()


def _train(parts: Run, folder: str, micro_batches: float) -> tuple[list[float], float]:
    """Seconds of steps, and of the first one."""
    trainer = parts.trainer
    trainer.resume = None
    if hasattr(parts.task, "cache_dir"):  # of what is computed before training: of these few samples it is of no use
        parts.task.cache_dir = folder
    few = Few(parts.data, trainer.micro_batch_size, parts.seed)
    trainer.setup(parts.task, few, parts.optimizer, parts.schedule, {}, f"{folder}/run", parts.seed)
    largest, *others = few.batches()
    count = min(math.ceil(micro_batches), MOST)
    first = _timed(trainer, [*others[: count - 1], largest])
    again = _timed(trainer, [*others[: count - 1], largest])  # now the optimizer has its numbers
    found: list[float] = []
    end = time.perf_counter() + PATIENCE
    while not found or (len(found) < 4 and time.perf_counter() + again < end):
        found.append(_whole_step(trainer, others[:count], micro_batches))
    trainer.check_finite()
    return found, first


def _whole_step(trainer: Any, window: list[Batch], micro_batches: float) -> float:
    """Seconds of a step with so many micro-batches."""
    seconds = _timed(trainer, window)
    missing = micro_batches - len(window)
    if missing == 0 or len(window) == 1:
        return seconds
    return seconds + missing * max(0.0, seconds - _timed(trainer, window[:1])) / (len(window) - 1)


def _timed(trainer: Any, window: list[Batch]) -> float:
    import torch

    began = time.perf_counter()
    trainer.train_step(window)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return time.perf_counter() - began


def main() -> None:
    """The other process."""
    prefer_ours()
    try:
        line = RESULT + json.dumps(asdict(run(**json.load(sys.stdin))))
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        line = REFUSED + json.dumps(str(error))
    print(line, flush=True)


if __name__ == "__main__":
    main()
