"""Throughput: how fast a run trains, and how much of its devices that uses.

Only steps are timed, from waiting for their data to the end of the optimizer's work; what callbacks do in between, such as
saving, drawing and generating, is not. A step in which a validation came in between is left out, and so is the first one of
each start, in which kernels are compiled and memory is found.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from bumblebee.callback import Callback
from bumblebee.distributed import process_group
from bumblebee.formatting import short
from bumblebee.hardware import flops

if TYPE_CHECKING:
    import torch

    from bumblebee.trainer import Trainer


class Throughput(Callback):
    """Adds tokens_per_second, tflops, mfu and memory_gb to the metrics.

    tokens_per_second counts the targets of all devices. tflops are each device's, by the rule of PaLM (arXiv 2204.02311,
    appendix B), prompts and padding included; mfu is their share of what the device could do. memory_gb is the most that the
    fullest device has held so far; on a CPU, its process.

    Args:
        every: optimizer steps that are taken together.
        peak_tflops: of one device in the precision that is trained in; null looks GPUs up, and measures a CPU.

    Raises:
        ValueError: every is less than 1, or peak_tflops is not more than 0.
    """

    _recent: _Work  # since the last report, of this rank
    _total: _Work  # of this start, of all ranks
    _began: float | None  # when the step that is timed began
    _warm: bool  # the first step is over
    _memory: float
    _peak: float | None
    _handle: Any

    def __init__(self, every: int = 10, peak_tflops: float | None = None) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(f"peak_tflops must be more than 0 or null, got {peak_tflops}")
        self.every, self.peak_tflops = every, peak_tflops
        self._clear()

    def on_fit_start(self, trainer: Trainer) -> None:
        """Find out what can be reached, and count from now on what goes through the model."""
        self._clear()
        self._peak = self.peak_tflops or _known_peak(trainer)
        self._per_token = flops.weight_flops_per_token(trainer.task.model)
        self._handle = trainer.engine.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def on_step_start(self, trainer: Trainer) -> None:
        """Start the clock; the device is idle, since the ranks have just talked to each other."""
        self._began, self._tokens_before, self._operations = time.perf_counter(), trainer.tokens, 0.0

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """What the clock shows is no training step any more."""
        self._began = None

    def on_step_end(self, trainer: Trainer) -> None:
        """Stop the clock; report if it is time."""
        if self._began is not None and self._warm:
            _wait_for(trainer.device)
            seconds = time.perf_counter() - self._began
            self._recent.add(seconds, trainer.tokens - self._tokens_before, self._operations)
        self._began, self._warm = None, True
        if trainer.step % self.every == 0 or trainer.step == trainer.plan.max_steps:
            for name, value in self._collect(trainer).items():
                trainer.log(name, value)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Let go of the model."""
        self._let_go()

    def on_fit_end(self, trainer: Trainer) -> None:
        """One line about the whole run."""
        self._let_go()
        self._collect(trainer)  # what a run that stopped early has left
        figures = self._figures(self._total, trainer)
        if trainer.is_main and figures:
            print(f"throughput: {_sentence(figures, self._memory, self._peak)}", flush=True)

    def _clear(self) -> None:
        self._recent, self._total = _Work(), _Work()
        self._began, self._warm = None, False
        self._memory, self._peak, self._handle = 0.0, None, None

    def _let_go(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Each pass that is trained on, by the shape (B, T) of its ids."""
        import torch

        ids = kwargs.get("input_ids", args[0] if args else None)
        if torch.is_tensor(ids) and torch.is_grad_enabled():
            self._operations += ids.numel() * (self._per_token + flops.attention_flops_per_token(module, ids.shape[-1]))

    def _collect(self, trainer: Trainer) -> dict[str, float]:
        """The figures since the last time, with the work of all ranks. Collective."""
        ranks = trainer.plan.world_size
        memory = {f"memory {rank}": _memory(trainer.device) * (rank == process_group.rank()) for rank in range(ranks)}
        sums = trainer.reduce_sums({"operations": self._recent.operations, **memory})
        self._memory = max(sums[name] for name in memory)
        recent = _Work(self._recent.seconds, self._recent.tokens, sums["operations"])
        self._total.add(recent.seconds, recent.tokens, recent.operations)
        self._recent = _Work()
        figures = self._figures(recent, trainer)
        return {**figures, "memory_gb": self._memory} if figures else {}

    def _figures(self, work: _Work, trainer: Trainer) -> dict[str, float]:
        if not work.seconds:
            return {}
        figures = {"tokens_per_second": work.tokens / work.seconds}
        if work.operations:
            figures["tflops"] = work.operations / work.seconds / trainer.plan.world_size / 1e12
            if self._peak is not None:
                figures["mfu"] = figures["tflops"] / self._peak
        return figures


class _Work:
    """What was done in how long."""

    def __init__(self, seconds: float = 0.0, tokens: int = 0, operations: float = 0.0) -> None:
        self.seconds, self.tokens, self.operations = seconds, tokens, operations

    def add(self, seconds: float, tokens: int, operations: float) -> None:
        self.seconds += seconds
        self.tokens += tokens
        self.operations += operations


def _known_peak(trainer: Trainer) -> float | None:
    """TFLOP/s of one device; None for a GPU that is not in the table, or in fp32, for which there is none."""
    import torch

    if trainer.device.type == "cpu":
        return flops.measure_peak_tflops(torch.bfloat16 if trainer.precision == "bf16" else torch.float32)
    return None if trainer.precision == "fp32" else flops.peak_tflops(torch.cuda.get_device_name(trainer.device))


def _wait_for(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the trainer waits at the end of each step anyway


def _memory(device: torch.device) -> float:
    """The most gigabytes held at any time so far."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _sentence(figures: dict[str, float], memory: float, peak: float | None) -> str:
    parts = [f"{short(figures['tokens_per_second'])} tokens/s"]
    if "tflops" in figures:
        share = f", {figures['mfu']:.1%} of {peak:.4g}" if "mfu" in figures else ""
        parts.append(f"{figures['tflops']:.3g} TFLOP/s a device{share}")
    return " · ".join([*parts, f"{memory:.3g} GB at most"])
