"""Signals: what the system tells a program from outside, such as that a run is to stop."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bumblebee.distributed.process_group import is_main


@contextmanager
def handled_by(handle: Callable[[int, Any], object], *numbers: int) -> Iterator[None]:
    """Inside, signals call ``handle`` with their number and the frame; afterwards whoever had them before has them again.

    Handlers can only be set in the main thread: in others nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C or SIGTERM asks the run to stop; a second one of the same kind stops at once.

    Args:
        stop: called with the first: the step is finished, and what it takes to continue is saved.
    """
    seen: set[int] = set()

    def handle(number: int, frame: object) -> None:
        if number in seen:  # another number is a launcher that passes Ctrl-C on as SIGTERM
            raise KeyboardInterrupt
        if is_main() and not seen:
            print("\nstopping: this step is finished and saved; once more stops at once", file=sys.stderr, flush=True)
        seen.add(number)
        stop()

    with handled_by(handle, signal.SIGINT, signal.SIGTERM):
        yield
