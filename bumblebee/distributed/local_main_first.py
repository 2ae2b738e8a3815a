"""Let one process of each machine prepare shared files before the others read them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from bumblebee.distributed import process_group
from bumblebee.distributed.process_group import OtherRankFailed

POLL = 0.1  # seconds
_calls = 0  # of local_main_first so far


@contextmanager
def local_main_first() -> Iterator[bool]:
    """Run the body on local rank 0 of each machine first, then on the others: ``with local_main_first() as is_first``.

    It may take any time: the others poll the launcher's store, whereas a collective would end the run after its timeout.

    Raises:
        OtherRankFailed: a local rank 0 failed while this rank waited for it.
    """
    is_first = process_group.local_rank() == 0
    if not process_group.is_distributed():
        yield True
        return
    key, machines = _next_key(is_first)
    store = process_group.store()
    if is_first:
        try:
            yield True
        except BaseException:
            store.add(f"{key}/failed", 1)
            raise
        store.add(f"{key}/done", 1)
    _wait_for(key, machines)
    if not is_first:
        yield False


def _wait_for(key: str, machines: int) -> None:
    import torch.distributed as dist

    store = process_group.store()
    try:
        while not (failed := store.add(f"{key}/failed", 0)) and store.add(f"{key}/done", 0) < machines:
            time.sleep(POLL)
    except dist.DistError:  # the rank that hosts the store has ended
        failed = 1
    if failed:
        raise OtherRankFailed("another rank failed while preparing shared files; see its error message")


def _next_key(is_first: bool) -> tuple[str, int]:
    """Return a store key that no earlier call used, and the number of machines. Collective."""
    global _calls
    import torch
    import torch.distributed as dist

    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    agreed = torch.tensor([_calls + 1], device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)  # a rank may have missed a call that failed
    _calls = int(agreed.item())
    machines = process_group.all_reduce_sum(torch.tensor([int(is_first)], device=device))
    return f"local-main-first-{_calls}", int(machines.item())
