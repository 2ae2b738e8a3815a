"""How models are built and loaded: whole or sharded over ranks (ZeRO-3), with weights or shapes only.

Constructors and ``from_pretrained`` of any class read ``current_load_context``, so that the settings need not be passed down
through user code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from torch import nn

from bumblebee.nn.quantized import Scheme


@dataclass(frozen=True)
class LoadContext:
    """How models are built.

    Args:
        sharded: ZeRO-3 shards each parameter over the ranks as it is created.
        shapes_only: parameters stay on the meta device; of a model folder only the config is read.
        quantize: linear layers are quantized as their weights are read, for inference.
    """

    sharded: bool = False
    shapes_only: bool = False
    quantize: Scheme | None = None


_current: ContextVar[LoadContext] = ContextVar("load_context", default=LoadContext())  # noqa: B039  (frozen)


def current_load_context() -> LoadContext:
    """Return the context in which a model is being built."""
    return _current.get()


@contextmanager
def load_context(**changes: bool | Scheme | None) -> Iterator[None]:
    """Build models under a changed context: ``with load_context(sharded=True)``. Other fields keep their values."""
    token = _current.set(replace(_current.get(), **changes))  # type: ignore[arg-type]
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Register parameters on the meta device, where they take no memory; buffers are real. Has no effect under ZeRO-3.

    Unlike ``accelerate.init_empty_weights``, a parameter that is registered twice stays one object, so that tied weights remain
    tied.
    """
    if current_load_context().sharded:
        yield
        return
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def shapes_only() -> Iterator[None]:
    """Build models without weights: parameters on the meta device, and only the configs of model folders are read."""
    with load_context(shapes_only=True), meta_parameters():
        yield
