"""Messages between ranks over the launcher's key-value store.

The results of checks are exchanged without collectives: a rank that fails in the middle of a training step leaves the others
waiting in a collective, where no collective could reach them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from bumblebee.distributed import process_group

if TYPE_CHECKING:
    from torch.distributed import Store


class RankMessages:
    """Exchanges texts by topic. ``topic`` is the one in progress, which the watchdog observes."""

    def __init__(self) -> None:
        self.rank, self.world_size = process_group.rank(), process_group.world_size()
        self.topic: str | None = None
        self.started_at = 0.0  # time.monotonic()

    def begin(self, topic: str) -> None:
        """Start work on a topic, to which every rank will post one message."""
        self.topic, self.started_at = topic, time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since ``begin``."""
        return time.monotonic() - self.started_at

    def post(self, topic: str, message: str, failed: bool = False) -> None:
        """Post this rank's message. ``failed`` starts the watchdog's grace period on the other ranks."""
        store = process_group.store()
        if failed:
            store.set(f"{topic}/failed", str(self.rank))
        store.set(f"{topic}/{self.rank}", message)

    def collect(self, topic: str) -> list[str]:
        """Wait for the messages of all ranks and return them in rank order."""
        while None in (messages := self.received(topic, process_group.store())):
            time.sleep(0.05)
        self.topic = None
        return [message for message in messages if message is not None]

    def received(self, topic: str, store: Store) -> list[str | None]:
        """Return the messages posted so far in rank order, None for a rank that has not posted."""
        keys = [f"{topic}/{rank}" for rank in range(self.world_size)]
        return [store.get(key).decode() if store.check([key]) else None for key in keys]

    def leave(self) -> None:
        """End the exchange. Rank 0, whose process may host the store, leaves last."""
        if self.rank:
            self.post("leave", "")
            return
        deadline = time.monotonic() + 10
        while None in self.received("leave", process_group.store())[1:] and time.monotonic() < deadline:
            time.sleep(0.05)
