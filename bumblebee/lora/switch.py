"""Switching a model's adapters off, for example to compute reference log-probabilities for DPO."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeGuard

from torch import nn


class AdapterLayer(Protocol):
    """What we use of PEFT's LoRA layers."""

    _disable_adapters: bool
    in_features: int
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    lora_magnitude_vector: nn.ModuleDict
    reads: tuple[nn.Module, ...]  # set by us: modules whose weights it reads, which ZeRO-3 must gather

    def get_base_layer(self) -> nn.Module: ...


def adapter_layers(model: nn.Module) -> Iterator[AdapterLayer]:
    """Yield PEFT's layers."""
    return (module for module in model.modules() if _is_adapter_layer(module))


def _is_adapter_layer(module: nn.Module) -> TypeGuard[AdapterLayer]:
    """Whether it has an attribute that all of PEFT's layers have: models without adapters need not import peft."""
    return hasattr(module, "_disable_adapters")


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
