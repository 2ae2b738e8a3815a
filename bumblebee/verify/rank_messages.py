"""Ranks telling each other what a check came to, through the launcher's store instead of a collective.

A rank that has failed in the middle of training leaves the others waiting in a collective, where they hear nothing. So each
rank has a thread that looks into the store: when a check cannot end any more, or takes far too long, it
ends the process, and rank 0 tells where each rank was.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bumblebee.distributed import process_group

if TYPE_CHECKING:
    from torch.distributed import Store

GRACE = 20.0  # seconds that the others have to end a check after one has failed in it
LIMIT = 300.0  # seconds that a check may take; it should take a few

GiveUp = Callable[[list[Any], list[str]], None]


class Ranks:
    """What the ranks of a verification say to each other."""

    def __init__(self) -> None:
        self.rank, self.size = process_group.rank(), process_group.world_size()
        self._topic: str | None = None
        self._since = 0.0
        self._over = threading.Event()

    def begin(self, topic: str) -> None:
        """The ranks work on something, about which each will ``tell``."""
        self._topic, self._since = topic, time.monotonic()

    @property
    def seconds(self) -> float:
        """Since ``begin``."""
        return time.monotonic() - self._since

    def tell(self, topic: str, value: Any, failed: bool = False) -> None:
        """Say what this rank has come to, as JSON values."""
        store = process_group.store()
        if failed:
            store.set(f"{topic}/failed", str(self.rank))
        store.set(f"{topic}/{self.rank}", json.dumps(value))

    def hear(self, topic: str) -> list[Any]:
        """What each rank has told, when all have."""
        while None in (found := self.heard(topic, process_group.store())):
            time.sleep(0.05)
        self._topic = None
        return found

    def heard(self, topic: str, store: Store) -> list[Any]:
        """What each rank has told so far, None where it has not."""
        keys = [f"{topic}/{rank}" for rank in range(self.size)]
        return [json.loads(store.get(key)) if store.check([key]) else None for key in keys]

    def part(self) -> None:
        """Leave: rank 0, whose process may hold the store, goes last."""
        if self.rank:
            self.tell("bye", True)
            return
        end = time.monotonic() + 10
        while None in self.heard("bye", process_group.store())[1:] and time.monotonic() < end:
            time.sleep(0.05)

    # -- giving up -----------------------------------------------------------------------------------------------------

    @contextmanager
    def watched(self, give_up: GiveUp) -> Iterator[None]:
        """Inside, a rank that cannot go on ends with exit code 1.

        Args:
            give_up: called first, on rank 0, with what each rank has told about the check that does not end, None where it has
                not, and with what each rank is doing.
        """
        if self.size == 1:
            yield
            return
        store = process_group.store().clone()  # type: ignore[attr-defined]
        with _signals_written_down() as signals:
            thread = threading.Thread(target=self._watch, args=(store, give_up, signals), daemon=True)
            thread.start()
            try:
                yield
            finally:
                self._over.set()
                thread.join()

    def _watch(self, store: Store, give_up: GiveUp, signals: int) -> None:
        over: dict[tuple[str, str], float] = {}  # why a check cannot end any more, and when this rank learned it
        while not self._over.wait(0.5):
            topic, now = self._topic, time.monotonic()
            if topic is None:
                continue
            if store.check([f"{topic}/failed"]):
                over.setdefault((topic, "failed"), now + GRACE)
            if signal.SIGTERM in _read(signals):
                over.setdefault((topic, "terminated"), now + 2)  # the main thread, if it hears of it, is faster
            if now > min([self._since + LIMIT, *(end for (of, _), end in over.items() if of == topic)]):
                try:
                    self._end(topic, store, give_up)
                finally:
                    os._exit(1)

    def _end(self, topic: str, store: Store, give_up: GiveUp) -> None:
        store.set(f"{topic}/place/{self.rank}", _place_of_main_thread())
        if self.rank == 0:
            time.sleep(3)  # the others come here a little earlier or later
            keys = [f"{topic}/place/{rank}" for rank in range(self.size)]
            places = [store.get(key).decode() if store.check([key]) else "gives no sign of life" for key in keys]
            give_up(self.heard(topic, store), places)
            store.set("given up", "")
        end = time.monotonic() + GRACE
        while not store.check(["given up"]) and time.monotonic() < end:
            time.sleep(0.1)


def _place_of_main_thread() -> str:
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return f"is still in {frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"


@contextmanager
def _signals_written_down() -> Iterator[int]:
    """A pipe that gets the number of each signal, also while the main thread waits in a collective and handles none."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield reading
    finally:
        signal.set_wakeup_fd(before)
        os.close(reading)
        os.close(writing)


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, 64)
    except BlockingIOError:
        return b""
