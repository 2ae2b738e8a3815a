"""How models are built and loaded at the moment: whole or sharded, with weights or shapes only.

Constructors and ``from_pretrained`` of any class ask ``current_load_context``; nobody has to pass the answer down to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LoadContext:
    """How models are built.

    Args:
        sharded: ZeRO-3 shards each parameter over the ranks as soon as it is created.
        shapes_only: parameters stay on the meta device, and only the config of a model folder is read.
    """

    sharded: bool = False
    shapes_only: bool = False


_current: ContextVar[LoadContext] = ContextVar("load_context", default=LoadContext())  # noqa: B039  (frozen)


def current_load_context() -> LoadContext:
    """The context in which a model is being built."""
    return _current.get()


@contextmanager
def load_context(**changes: bool) -> Iterator[None]:
    """Build models under a changed context: ``with load_context(sharded=True)``. Other fields keep their values."""
    token = _current.set(replace(_current.get(), **changes))
    try:
        yield
    finally:
        _current.reset(token)
