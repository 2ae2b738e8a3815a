"""Switching a model's adapters off, for example to compute reference log-probabilities for DPO."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def adapter_layers(model: nn.Module) -> Iterator[Any]:
    """Yield PEFT's layers, recognised by an attribute that all have, so that models without adapters need not import peft."""
    return (module for module in model.modules() if hasattr(module, "_disable_adapters"))


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return any(True for _ in adapter_layers(model))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Compute what the base model computes, inside the context. Nothing is moved or copied.

    Raises:
        ValueError: the model has no adapters.
    """
    layers = list(adapter_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA adapters to switch off")
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled
