"""Handlers for SIGINT and SIGTERM that are restored afterwards."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SignalHandler = Callable[[int, FrameType | None], object]


@contextmanager
def handle_signals(handler: SignalHandler, *numbers: int) -> Iterator[None]:
    """Install a handler for the given signals inside the context and restore the previous handlers at its end.

    Python allows handlers only in the main thread; in other threads this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)


@contextmanager
def stop_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Let SIGINT (Ctrl-C) and SIGTERM stop a run after the current step; a second signal of the same number stops at once.

    Args:
        stop: called on the first signal; the run finishes its step and saves a checkpoint.
    """
    seen: set[int] = set()

    def handler(number: int, frame: FrameType | None) -> None:
        if number in seen:  # a launcher may forward Ctrl-C as SIGTERM: another number is not a second request
            raise KeyboardInterrupt
        first = not seen
        seen.add(number)
        if first:
            stop()

    with handle_signals(handler, signal.SIGINT, signal.SIGTERM):
        yield
