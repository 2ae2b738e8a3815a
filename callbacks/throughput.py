"""Throughput: tokens per second, FLOP/s, MFU, GPU utilization and peak memory.

Only training steps are timed, from waiting for data to the end of the optimizer step; saving, plotting and generating are not.
Steps that include a validation are left out, and so is the first step of each start, which compiles kernels and allocates
memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bumblebee.callback import Callback
from bumblebee.distributed import process_group
from bumblebee.hardware import flops
from bumblebee.hardware.gpu_utilization import UtilizationMeter
from bumblebee.utils.formatting import short

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from bumblebee.trainer import Trainer


@dataclass
class _Work:
    """Training work, the time it took, and the sum and number of samples of GPU utilization meanwhile."""

    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    utilization: float = 0.0
    samples: float = 0

    def add(self, work: _Work) -> None:
        self.seconds += work.seconds
        self.tokens += work.tokens
        self.flops += work.flops
        self.utilization += work.utilization
        self.samples += work.samples


class Throughput(Callback):
    """Adds tokens_per_second, tflops, mfu, gpu_utilization and memory_gb to the metrics.

    tokens_per_second counts the targets of all devices. tflops are per device, by the rule of PaLM (arXiv 2204.02311, appendix
    B), prompts and padding included; mfu is their share of the device's peak. gpu_utilization is the share of
    time, from 0 to 1, in which a GPU computes anything, averaged over devices; it is absent on a CPU and without the package
    nvidia-ml-py. memory_gb is the peak memory of the fullest device so far; on a CPU, of its process.

    Args:
        every: optimizer steps to average over.
        peak_tflops: peak of one device in the training precision; null looks GPUs up in a table, and measures a CPU.

    Raises:
        ValueError: every is less than 1, or peak_tflops is not greater than 0.
    """

    _recent: _Work  # since the last report, of this rank
    _total: _Work  # of this start, of all ranks
    _began: float | None  # start of the step that is timed
    _warm: bool  # the first step is over
    _memory: float
    _peak: float | None
    _handle: RemovableHandle | None
    _utilization: UtilizationMeter

    def __init__(self, every: int = 10, peak_tflops: float | None = None) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(f"peak_tflops must be greater than 0 or null, got {peak_tflops}")
        self.every, self.peak_tflops = every, peak_tflops
        self._clear()

    def on_fit_start(self, trainer: Trainer) -> None:
        """Determine the peak, and count FLOPs of forward passes from here on."""
        self._clear()
        self._peak = self.peak_tflops or _peak_tflops(trainer)
        self._utilization = UtilizationMeter(trainer.device)
        self._flops_per_token = flops.weight_flops_per_token(trainer.task.model)
        self._handle = trainer.engine.model.register_forward_pre_hook(self._count_flops, with_kwargs=True)

    def on_step_start(self, trainer: Trainer) -> None:
        """Start the clock. The device is idle: the ranks have just exchanged their target counts."""
        self._began, self._tokens_before, self._step_flops = time.perf_counter(), trainer.tokens, 0.0

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Discard the step: its time includes the validation."""
        self._began = None

    def on_step_end(self, trainer: Trainer) -> None:
        """Stop the clock; log the averages if due."""
        if self._began is not None and self._warm:
            _synchronize(trainer.device)
            seconds = time.perf_counter() - self._began
            self._recent.add(_Work(seconds, trainer.tokens - self._tokens_before, self._step_flops))
            self._utilization.sample()
        self._began, self._warm = None, True
        if trainer.step % self.every == 0 or trainer.step == trainer.plan.max_steps:
            for name, value in self._collect(trainer).items():
                trainer.log(name, value)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Remove the hook from the model."""
        self._remove_hook()

    def on_fit_end(self, trainer: Trainer) -> None:
        """Print the averages over the whole run."""
        self._remove_hook()
        self._collect(trainer)  # steps since the last report of a run that stopped early
        averages = self._averages(self._total, trainer)
        if averages:
            trainer.print(f"throughput: {_describe(averages, self._memory, self._peak)}")

    def _clear(self) -> None:
        self._recent, self._total = _Work(), _Work()
        self._began, self._warm = None, False
        self._memory, self._peak, self._handle = 0.0, None, None

    def _remove_hook(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _count_flops(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: add the FLOPs of each pass with gradients, from the shape (B, T) of its input ids."""
        import torch

        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, torch.Tensor) and torch.is_grad_enabled():
            self._step_flops += ids.numel() * (self._flops_per_token + flops.attention_flops_per_token(module, ids.shape[-1]))

    def _collect(self, trainer: Trainer) -> dict[str, float]:
        """The metrics since the last report, over all ranks. Collective."""
        ranks = trainer.plan.world_size
        memory = {f"memory {rank}": _peak_memory(trainer.device) * (rank == process_group.rank()) for rank in range(ranks)}
        utilization, samples = self._utilization.pop()
        sums = trainer.reduce_sums(
            {"flops": self._recent.flops, "utilization": utilization, "samples": samples, **memory}
        )  # fmt: skip
        self._memory = max(sums[name] for name in memory)
        recent = _Work(self._recent.seconds, self._recent.tokens, sums["flops"], sums["utilization"], sums["samples"])
        self._total.add(recent)
        self._recent = _Work()
        averages = self._averages(recent, trainer)
        return {**averages, "memory_gb": self._memory} if averages else {}

    def _averages(self, work: _Work, trainer: Trainer) -> dict[str, float]:
        if not work.seconds:
            return {}
        averages = {"tokens_per_second": work.tokens / work.seconds}
        if work.flops:
            averages["tflops"] = work.flops / work.seconds / trainer.plan.world_size / 1e12
            if self._peak is not None:
                averages["mfu"] = averages["tflops"] / self._peak
        if work.samples:
            averages["gpu_utilization"] = work.utilization / work.samples
        return averages


def _peak_tflops(trainer: Trainer) -> float | None:
    """Peak TFLOP/s of one device; None for a GPU that is not in the table, and in fp32, which the table lacks."""
    import torch

    if trainer.device.type == "cpu":
        return flops.measure_peak_tflops(torch.bfloat16 if trainer.precision == "bf16" else torch.float32)
    return None if trainer.precision == "fp32" else flops.peak_tflops(torch.cuda.get_device_name(trainer.device))


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the trainer synchronizes at the end of each step anyway


def _peak_memory(device: torch.device) -> float:
    """Peak memory so far in GB."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _describe(averages: dict[str, float], memory: float, peak: float | None) -> str:
    parts = [f"{short(averages['tokens_per_second'])} tokens/s"]
    if "tflops" in averages:
        parts.append(f"{averages['tflops']:.3g} TFLOP/s per device")
    if "mfu" in averages:
        parts.append(f"MFU {averages['mfu']:.1%} of {peak:.4g} TFLOP/s")
    if "gpu_utilization" in averages:
        parts.append(f"GPU utilization {averages['gpu_utilization']:.0%}")
    return " · ".join([*parts, f"peak memory {memory:.3g} GB"])
