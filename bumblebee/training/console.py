"""Console: what a run prints besides its progress, passed on to callbacks that keep it, such as FileLog."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable

_HISTORY = 1000  # texts; only those printed before a subscription are needed


class Console:
    """Prints to stdout without tearing the progress bar, and passes each text on to subscribers."""

    def __init__(self) -> None:
        self._printed: deque[str] = deque(maxlen=_HISTORY)
        self._subscribers: list[Callable[[str], None]] = []

    def print(self, text: str) -> None:
        """Print a text of one or more lines."""
        from tqdm import tqdm

        tqdm.write(text)
        sys.stdout.flush()
        self._printed.append(text)
        for subscriber in self._subscribers:
            subscriber(text)

    def subscribe(self, subscriber: Callable[[str], None]) -> None:
        """Call ``subscriber`` with each text printed so far and from now on, so that the order of callbacks does not matter."""
        for text in self._printed:
            subscriber(text)
        self._subscribers.append(subscriber)
