"""Throughput of the machine: matrix products, memory, all-reduce and disk, measured on all ranks at once, as in training.

Throughputs have no bounds. Each is the best of several attempts; over ranks the slowest is reported, since it sets the pace.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy
import torch

from bumblebee.checkpoint.atomic import flush
from bumblebee.distributed import process_group
from bumblebee.verify.check_result import CheckResult, Measurement
from bumblebee.verify.context import Context

MIB = 2**20
MATMUL_SIZES = {"cuda": (2048, 4096, 8192, 16384), "cpu": (256, 512, 1024, 2048)}
TIME_BUDGET = 0.4  # seconds of repetitions of each measurement


def matmul_throughput(context: Context) -> CheckResult:
    """Square matrix products in the training dtype, 2 n^3 FLOPs each, at the best of several n."""
    best, best_size = 0.0, 0
    for n in MATMUL_SIZES[context.device.type]:
        a, b = (torch.randn(n, n, device=context.device, dtype=context.dtype) for _ in range(2))
        out = torch.empty_like(a)
        best, best_size = max(
            (best, best_size), (2 * n**3 / _best_seconds(partial(torch.mm, a, b, out=out), context.device), n)
        )
        del a, b, out
    return _throughput(f"{context.options.precision}, best at n = {best_size}:", best / 1e12, "TFLOP/s")


def memory_bandwidth(context: Context) -> CheckResult:
    """A copy that does not fit any cache: bytes read plus bytes written."""
    size = 1024 * MIB if context.device.type == "cuda" else 128 * MIB
    source = torch.zeros(size, dtype=torch.uint8, device=context.device)
    target = torch.ones_like(source)
    seconds = _best_seconds(lambda: target.copy_(source), context.device)
    return _throughput(f"copy of {size // MIB} MiB:", 2 * size / seconds / 1e9, "GB/s")


def all_reduce_bandwidth(context: Context) -> CheckResult:
    """Bus bandwidth of an all-reduce over n ranks, as in nccl-tests: 2 (n - 1) / n * bytes / seconds."""
    import torch.distributed as dist

    size = 256 * MIB if context.device.type == "cuda" else 16 * MIB
    ranks, attempts = process_group.world_size(), 8
    process_group.start(context.device)
    orderly = False
    try:
        tensor = torch.zeros(size // 4, device=context.device)
        seconds = torch.empty(attempts, dtype=torch.float64, device=context.device)
        for attempt in range(attempts):  # the first ones are warm-up
            process_group.barrier()
            seconds[attempt] = duration(lambda: dist.all_reduce(tensor), context.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        orderly = True
    finally:
        process_group.stop(orderly)
    bandwidth = 2 * (ranks - 1) / ranks * size / float(seconds.min()) / 1e9
    return _throughput(f"bus bandwidth of {ranks} ranks, {size // MIB} MiB:", bandwidth, "GB/s")


def disk_write(context: Context) -> CheckResult:
    """Write a file the way checkpoints are written, including fsync."""
    ranks, limit = process_group.world_size(), 5.0
    block = numpy.random.default_rng(process_group.rank()).bytes(8 * MIB)
    file = context.folder / f"disk-{process_group.rank()}"
    begin, blocks = time.perf_counter(), 0
    with file.open("wb") as stream:
        while blocks < max(2, 32 // ranks) and time.perf_counter() - begin < limit:
            stream.write(block)
            blocks += 1
    flush(file)
    throughput = blocks * len(block) / (time.perf_counter() - begin) / 1e6
    file.unlink()
    return _throughput(f"{blocks * 8} MiB with fsync:", throughput, "MB/s" if ranks == 1 else f"MB/s on each of {ranks} ranks")


def _throughput(name: str, value: float, unit: str) -> CheckResult:
    return CheckResult((Measurement(name, value, unit=unit),))


def _best_seconds(function: Callable[[], object], device: torch.device) -> float:
    """The shortest time of one call after a warm-up call, over about ``TIME_BUDGET`` seconds."""
    duration(function, device)
    once = duration(function, device)
    calls = max(1, int(0.02 / once))  # long enough together for the clock and the launch overhead of GPU kernels
    best, deadline = once, time.perf_counter() + TIME_BUDGET
    while time.perf_counter() < deadline:
        best = min(best, duration(lambda: [function() for _ in range(calls)], device) / calls)
    return best


def duration(function: Callable[[], object], device: torch.device) -> float:
    """Duration of one call, until the device has finished it."""
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
