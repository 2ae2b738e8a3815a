"""Ctrl-C while an answer comes: it ends the answer where that can be done in order.

Left to itself Python raises KeyboardInterrupt at whatever line it happens to be: inside a step of the engine, whose pages would
be lost, or inside a destructor or a callback, which swallows it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bumblebee.signals import handled_by


@contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C raises nothing; the function that is given tells whether it has been pressed."""
    pressed: list[int] = []
    with handled_by(lambda number, frame: pressed.append(number), signal.SIGINT):
        yield lambda: bool(pressed)


@contextmanager
def raised() -> Iterator[None]:
    """Inside, which is within ``noted``, Ctrl-C is noted and raises KeyboardInterrupt too: that ends a wait."""
    before = signal.getsignal(signal.SIGINT)

    def note_and_raise(number: int, frame: object) -> None:
        if callable(before):
            before(number, None)
        raise KeyboardInterrupt

    with handled_by(note_and_raise, signal.SIGINT):
        yield
