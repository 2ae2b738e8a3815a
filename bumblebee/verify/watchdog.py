"""Watchdog: ends a rank whose check can no longer finish, after rank 0 has reported where each rank was.

A thread on each rank polls the launcher's store, because the main thread may be stuck in a collective with a rank that has
failed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bumblebee.distributed import process_group
from bumblebee.verify.rank_messages import RankMessages

if TYPE_CHECKING:
    from torch.distributed import Store

GRACE = 20.0  # seconds to finish a check after another rank has failed in it
LIMIT = 300.0  # seconds a check may take; a few are normal

GiveUp = Callable[[list[str | None], list[str]], None]


class Watchdog:
    """Ends the process with exit code 1 when the check in progress cannot finish.

    Args:
        messages: of this rank.
        give_up: called first, on rank 0, with the messages received about the unfinished check (None for a rank without
            one) and with the location of each rank's main thread.
    """

    def __init__(self, messages: RankMessages, give_up: GiveUp) -> None:
        self._messages, self._give_up = messages, give_up
        self._stopped = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch while the context is open. Does nothing with a single rank."""
        if self._messages.world_size == 1:
            yield
            return
        store = process_group.store().clone()  # type: ignore[attr-defined]
        with _signal_pipe() as signals:
            thread = threading.Thread(target=self._watch, args=(store, signals), daemon=True)
            thread.start()
            try:
                yield
            finally:
                self._stopped.set()
                thread.join()

    def _watch(self, store: Store, signals: int) -> None:
        deadlines: dict[tuple[str, str], float] = {}  # by topic and reason
        while not self._stopped.wait(0.5):
            topic, now = self._messages.topic, time.monotonic()
            if topic is None:
                continue
            if store.check([f"{topic}/failed"]):
                deadlines.setdefault((topic, "failed"), now + GRACE)
            if signal.SIGTERM in _read(signals):
                deadlines.setdefault((topic, "terminated"), now + 2)  # the main thread is faster, if it can handle the signal
            own = [end for (of_topic, _), end in deadlines.items() if of_topic == topic]
            if now > min([self._messages.started_at + LIMIT, *own]):
                try:
                    self._report(topic, store)
                finally:
                    os._exit(1)

    def _report(self, topic: str, store: Store) -> None:
        messages = self._messages
        store.set(f"{topic}/location/{messages.rank}", _main_thread_location())
        if messages.rank == 0:
            time.sleep(3)  # the other watchdogs may be a little later
            keys = [f"{topic}/location/{rank}" for rank in range(messages.world_size)]
            locations = [store.get(key).decode() if store.check([key]) else "does not respond" for key in keys]
            self._give_up(messages.received(topic, store), locations)
            store.set("given up", "")
        deadline = time.monotonic() + GRACE
        while not store.check(["given up"]) and time.monotonic() < deadline:
            time.sleep(0.1)


def _main_thread_location() -> str:
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return f"is still in {frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"


@contextmanager
def _signal_pipe() -> Iterator[int]:
    """A pipe that receives the number of each signal, even while the main thread is in a collective and handles none."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    previous = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    try:
        yield read_end
    finally:
        signal.set_wakeup_fd(previous)
        os.close(read_end)
        os.close(write_end)


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, 64)
    except BlockingIOError:
        return b""
