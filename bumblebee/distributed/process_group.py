"""Rank and world size, joining and leaving the process group, and the few collectives that training needs.

Ranks come from the launcher's environment variables (torchrun, deepspeed); without a launcher there is one process. torch is
imported inside the functions: the command line needs its rank before it pays for torch.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup, Store

T = TypeVar("T")
_launcher_store: Store | None = None  # joined once per process
_groups = 0  # number of groups joined so far
_host_group: ProcessGroup | None = None  # see host_sum
_failure_handler: Callable[[BaseException], None] | None = None  # see failures_reported_to
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_environment: dict[str, str | None] = {}  # these variables before ``start``
LOST_RANK_ERRORS = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "NCCL error",
)  # fmt: skip


class OtherRankFailed(RuntimeError):
    """Another rank failed at something that this one waits for; that rank reports the reason."""


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error of torch means that another rank has died without reporting why, e.g. killed by the system."""
    return isinstance(error, RuntimeError) and world_size() > 1 and any(text in str(error) for text in LOST_RANK_ERRORS)


def rank() -> int:
    """This process's rank among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's rank on its machine, from 0. A single process is 0 whatever its GPU, see ``start``."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


def world_size() -> int:
    """Number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is rank 0, the only one that logs and writes files."""
    return rank() == 0


def pick_device(name: str) -> torch.device:
    """Return this rank's device for "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: an unknown name, a GPU that does not exist, or one GPU for several ranks.
    """
    import torch

    from bumblebee.hardware.cuda import configure_cuda

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device_type, _, number = name.partition(":")
    if device_type not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise ValueError(f"unknown device {name!r}: expected auto, cpu, cuda or cuda:N")
    if device_type == "cpu":
        return torch.device("cpu")
    if number and world_size() > 1:
        raise ValueError(f"device {name!r} is one GPU, and each of {world_size()} ranks needs its own: write cuda")
    index = int(number) if number else local_rank()
    if index >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} does not exist: {torch.cuda.device_count()} GPUs are visible")
    device = torch.device("cuda", index)
    configure_cuda(device)
    return device


def start(device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Initialize the process group. A single process forms a group of one without a launcher or a port."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    _environment.update({name: os.environ.get(name) for name in _RANK_VARIABLES})
    if world_size() == 1:
        os.environ.setdefault("RANK", "0")
        os.environ.setdefault("WORLD_SIZE", "1")
        os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed takes it for the number of the GPU, also in later steps
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=timeout, store=_unused_store(timeout), rank=rank(), world_size=world_size())


def store() -> Store:
    """The launcher's key-value store, which ranks can use without a process group, and while one hangs."""
    global _launcher_store
    import torch.distributed as dist

    if _launcher_store is None:
        _launcher_store = next(dist.rendezvous("env://"))[0] if world_size() > 1 else dist.HashStore()
    return _launcher_store


def _unused_store(timeout: timedelta) -> Store:
    """A prefix of the store for the next group: it would take an earlier group's keys for addresses and wait forever."""
    global _groups
    import torch.distributed as dist

    _groups += 1
    store().set_timeout(timeout)
    return dist.PrefixStore(f"group-{_groups}", store())


def stop(orderly: bool) -> None:
    """Destroy the process group. gloo threads that outlive the interpreter would abort it with exit code -6.

    Args:
        orderly: all ranks get here and can wait for each other; False after an error, when other ranks may be anywhere.
            On several GPUs an exception that is being handled then ends the process, see ``exit_after_failure``.
    """
    global _host_group
    import torch.distributed as dist

    if not orderly and (error := sys.exc_info()[1]):
        exit_after_failure(error)

    if not dist.is_initialized():
        _restore_environment()
        return
    gc.collect()  # objects that still hold the group keep its threads alive
    if orderly:
        dist.barrier()
    _host_group = None
    dist.destroy_process_group()
    _restore_environment()


def _restore_environment() -> None:
    """Undo what ``start`` and DeepSpeed have set: the next run in this process may be on another device, or have a launcher."""
    while _environment:
        name, value = _environment.popitem()
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def exit_after_failure(error: BaseException) -> None:
    """End this process if unwinding would hang: after a failure of one of several ranks on GPUs.

    Destroying an NCCL group and freeing memory wait for collectives in which the other ranks sit, until the watchdog ends them
    after half an hour (pytorch/torchtitan#1342). The error is printed first, as nothing else would; the launcher then ends the
    other ranks. Inside ``failures_reported_to`` the error is reported instead, and the process goes on.
    """
    import multiprocessing

    import torch.distributed as dist

    if not is_distributed() or dist.get_backend() != "nccl":
        return
    if _failure_handler is not None:
        _failure_handler(error)
        return
    code = 130 if isinstance(error, KeyboardInterrupt) else 1
    if isinstance(error, SystemExit):  # a user error, which has been printed
        code = error.code if isinstance(error.code, int) else 1
    else:
        traceback.print_exception(error)
    for process in multiprocessing.active_children():  # workers that prepare batches, which atexit would end
        process.terminate()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


@contextmanager
def failures_reported_to(handler: Callable[[BaseException], None]) -> Iterator[None]:
    """Inside, ``exit_after_failure`` calls the handler and does not exit: for a caller that ends hanging ranks itself."""
    global _failure_handler
    before, _failure_handler = _failure_handler, handler
    try:
        yield
    finally:
        _failure_handler = before


def is_distributed() -> bool:
    """Whether a process group of several ranks is initialized."""
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor on the run's device over ranks, in place. Collective."""
    import torch.distributed as dist

    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def host_sum(numbers: Sequence[float]) -> list[float]:
    """Sum numbers that the host has over ranks; exact for integers. Collective; never waits for a GPU."""
    if not is_distributed():
        return [float(number) for number in numbers]
    import torch
    import torch.distributed as dist

    vector = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(vector, group=_group_of_hosts())
    return vector.tolist()


def _group_of_hosts() -> ProcessGroup | None:
    """A group for tensors in main memory, which NCCL cannot reduce; None for the default group if that is gloo's."""
    global _host_group
    import torch.distributed as dist

    if _host_group is None and dist.get_backend() == "nccl":
        _host_group = dist.new_group(backend="gloo")
    return _host_group


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank. Collective; never waits for a GPU."""
    return host_sum([flag])[0] > 0


def raise_on_all_ranks(error: Exception | None, message: str) -> None:
    """Raise this rank's error, or ``OtherRankFailed`` with the message if only another rank has one. Collective."""
    if any_rank(error is not None):
        raise error or OtherRankFailed(message)


def all_gather_items(items: list[T]) -> list[T]:
    """Concatenate the lists of all ranks, in the order of ranks. Collective."""
    if not is_distributed():
        return items
    import torch.distributed as dist

    lists: list[list[T]] = [[]] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for per_rank in lists for item in per_rank]


def share_of_machine(items: Sequence[T]) -> Sequence[T]:
    """This rank's share of items that each machine needs once, whatever its number of ranks. Collective."""
    names = all_gather_items([socket.gethostname()])
    here = [index for index, name in enumerate(names) if name == socket.gethostname()]
    return items[here.index(rank()) :: len(here)] if len(names) > 1 else items


def barrier() -> None:
    """Wait until all ranks reach this point."""
    import torch.distributed as dist

    if is_distributed():
        dist.barrier()
