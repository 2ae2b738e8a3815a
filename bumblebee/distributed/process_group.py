"""Ranks: who am I, how many are we, and the few collectives that the loop needs.

Ranks come from the launcher's environment (torchrun, deepspeed); without one there is a single process and no launcher is
needed. torch is imported inside the functions: the command line asks for its rank before it pays for torch.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import Store


building_in_shards = False  # true while ZeRO-3 cuts each parameter over the ranks as soon as it is made
_launchers_store: Store | None = None  # joined once a process
_groups = 0  # joined so far, one after the other
_turns = 0  # of first_on_each_machine so far
POLL = 0.1  # seconds


class OtherRankFailed(RuntimeError):
    """Another rank failed at something this one waits for; that rank tells why."""


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error of torch means that another rank has ended without a word, killed by the system for instance."""
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "NCCL error")
    return isinstance(error, RuntimeError) and world_size() > 1 and any(sign in str(error) for sign in lost)


def rank() -> int:
    """This process among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is rank 0, the only one that speaks and writes."""
    return rank() == 0


def pick_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:N" -> the device of this rank.

    Raises:
        ValueError: an unknown name, or a GPU that is not there.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise ValueError(f"unknown device {name!r}; write auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    index = int(number) if number else local_rank()
    if index >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: {torch.cuda.device_count()} GPUs are visible")
    return torch.device("cuda", index)


def start(device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Join the other ranks; alone, a group of one that needs neither a launcher nor a free port."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size() == 1:
        os.environ.setdefault("RANK", "0")
        os.environ.setdefault("WORLD_SIZE", "1")
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=timeout, store=_unused_store(timeout), rank=rank(), world_size=world_size())


def store() -> Store:
    """Keys and values that the ranks share through their launcher. It works without a group, and when one hangs."""
    global _launchers_store
    import torch.distributed as dist

    if _launchers_store is None:
        _launchers_store = next(dist.rendezvous("env://"))[0] if world_size() > 1 else dist.HashStore()
    return _launchers_store


def _unused_store(timeout: timedelta) -> Store:
    """A part of the store for the next group alone: it would read an earlier one's keys as addresses, and wait for ever."""
    global _groups
    import torch.distributed as dist

    _groups += 1
    store().set_timeout(timeout)
    return dist.PrefixStore(f"group-{_groups}", store())


def stop(orderly: bool) -> None:
    """Leave the group. gloo threads that outlive the interpreter abort it with exit code -6, after a run that succeeded.

    Args:
        orderly: all ranks come here, so they can wait for each other; after an error nobody knows where the others are.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    gc.collect()  # what still holds a group holds its threads
    if orderly:
        dist.barrier()
    dist.destroy_process_group()


def _many() -> bool:
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks of a tensor on the run's device, in place; the tensor itself when alone."""
    import torch.distributed as dist

    if _many():
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank. Collective; the GPU is waited for."""
    if not _many():
        return flag
    import torch

    return bool(all_reduce_sum(torch.tensor([int(flag)], device=device)).item())


def gathered(items: list[Any]) -> list[Any]:
    """The lists of all ranks, one after the other. Collective."""
    if not _many():
        return items
    import torch.distributed as dist

    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for of_rank in lists for item in of_rank]


def barrier() -> None:
    """Wait until all ranks are here."""
    import torch.distributed as dist

    if _many():
        dist.barrier()


@contextmanager
def first_on_each_machine() -> Iterator[bool]:
    """Let one rank of each machine do the body before the others: ``with ... as first``. The others find its result.

    It may take as long as it takes: the others look at the launcher's store meanwhile, where a collective would end the run
    after its timeout. If one of those ranks fails, the others get OtherRankFailed instead of waiting for ever.
    """
    first = local_rank() == 0
    if not _many():
        yield True
        return
    turn, machines = _next_turn(first)
    if first:
        try:
            yield True
        except BaseException:
            store().add(f"{turn}/failed", 1)
            raise
        store().add(f"{turn}/done", 1)
    _wait_for(turn, machines)
    if not first:
        yield False


def _wait_for(turn: str, machines: int) -> None:
    import torch.distributed as dist

    try:
        while not (failed := store().add(f"{turn}/failed", 0)) and store().add(f"{turn}/done", 0) < machines:
            time.sleep(POLL)
    except dist.DistError:  # the rank that holds the store has ended
        failed = 1
    if failed:
        raise OtherRankFailed("another rank failed while it prepared shared files; its message tells why")


def _next_turn(first: bool) -> tuple[str, int]:
    """A name that no turn has had before, and how many ranks are the first of their machine. Collective."""
    global _turns
    import torch
    import torch.distributed as dist

    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    agreed = torch.tensor([_turns + 1], device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)  # a rank may have missed one that was refused
    _turns = int(agreed.item())
    return f"first-on-each-machine-{_turns}", int(all_reduce_sum(torch.tensor([int(first)], device=device)).item())
