"""How fast the machine is: matrix products, memory, ranks, disk. Measured on all ranks at once, as training uses them.

Nothing is demanded. The best of several attempts counts, and of several ranks the slowest one is shown: it sets the pace.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy
import torch

from bumblebee.checkpoint.atomic import flush
from bumblebee.distributed import process_group
from bumblebee.verify.check_result import Measure
from bumblebee.verify.context import Setting

MIB = 2**20


def matmul(setting: Setting) -> list[Measure]:
    """The best rate of square matrix products in the training dtype, 2 n^3 operations each."""
    sizes = (2048, 4096, 8192, 16384) if setting.device.type == "cuda" else (256, 512, 1024, 2048)
    best = (0.0, 0)
    for n in sizes:
        a, b = (torch.randn(n, n, device=setting.device, dtype=setting.dtype) for _ in range(2))
        out = torch.empty_like(a)
        best = max(best, (2 * n**3 / _best_seconds(partial(torch.mm, a, b, out=out), setting.device), n))
        del a, b, out
    return [Measure(f"{setting.options.precision}, best at n = {best[1]}:", best[0] / 1e12, unit="TFLOP/s")]


def memory(setting: Setting) -> list[Measure]:
    """A copy too large for any cache: bytes read plus bytes written."""
    size = 1024 * MIB if setting.device.type == "cuda" else 128 * MIB
    source = torch.zeros(size, dtype=torch.uint8, device=setting.device)
    target = torch.ones_like(source)
    seconds = _best_seconds(lambda: target.copy_(source), setting.device)
    return [Measure(f"copy of {size // MIB} MiB:", 2 * size / seconds / 1e9, unit="GB/s")]


def all_reduce(setting: Setting) -> list[Measure]:
    """Sum over n ranks. Bus bandwidth is 2 (n - 1) / n * bytes / seconds: what each link must carry, whatever n is."""
    import torch.distributed as dist

    size = 256 * MIB if setting.device.type == "cuda" else 16 * MIB
    ranks, attempts = process_group.world_size(), 8
    process_group.start(setting.device)
    orderly = False
    try:
        tensor = torch.zeros(size // 4, device=setting.device)
        seconds = torch.empty(attempts, dtype=torch.float64, device=setting.device)
        for attempt in range(attempts):  # the first ones warm up; the best counts
            process_group.barrier()
            seconds[attempt] = _seconds(lambda: dist.all_reduce(tensor), setting.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        orderly = True
    finally:
        process_group.stop(orderly)
    bandwidth = 2 * (ranks - 1) / ranks * size / float(seconds.min()) / 1e9
    return [Measure(f"bus bandwidth of {ranks} ranks, {size // MIB} MiB:", bandwidth, unit="GB/s")]


def disk(setting: Setting) -> list[Measure]:
    """Writing a file as a checkpoint's are written, until it is on the disk (fsync)."""
    ranks, limit = process_group.world_size(), 5.0
    block = numpy.random.default_rng(process_group.rank()).bytes(8 * MIB)
    file = setting.folder / f"written-{process_group.rank()}"
    begin, blocks = time.perf_counter(), 0
    with file.open("wb") as stream:
        while blocks < max(2, 32 // ranks) and time.perf_counter() - begin < limit:
            stream.write(block)
            blocks += 1
    flush(file)
    rate = blocks * len(block) / (time.perf_counter() - begin) / 1e6
    file.unlink()
    return [Measure(f"{blocks * 8} MiB with fsync:", rate, unit="MB/s" if ranks == 1 else f"MB/s on each of {ranks} ranks")]


def _best_seconds(work: Callable[[], object], device: torch.device, spend: float = 0.4) -> float:
    """The shortest time of one call, after a first one, within about so many seconds."""
    _seconds(work, device)
    once = _seconds(work, device)
    calls = max(1, int(0.02 / once))  # together long enough for the clock and for the launch of GPU kernels
    best, end = once, time.perf_counter() + spend
    while time.perf_counter() < end:
        best = min(best, _seconds(lambda: [work() for _ in range(calls)], device) / calls)
    return best


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
