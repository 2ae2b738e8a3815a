"""Transforms that modify a model in place before training, listed in a recipe under ``task.transforms``.

A transform is a callable that takes the model; a function works too. State-dict keys do not change, so model folders do not
depend on transforms. LoRA, in ``bumblebee.lora``, is also a transform.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

from bumblebee.models.base import LanguageModel
from bumblebee.nn.block_forward import BlockForward


def apply_transforms(model: nn.Module, transforms: Sequence[Callable[[nn.Module], object]] | None) -> Sequence[Callable]:
    """Apply transforms to a model in order, and return them."""
    for transform in transforms or ():
        transform(model)
    return transforms or ()


class ActivationCheckpointing:
    """Recompute blocks in the backward pass instead of storing their activations (arXiv 1604.06174).

    Args:
        every: 1 checkpoints all blocks, 2 every second block, and so on: saves less memory and costs less time.
        keep_attention: keep the results of attention, whose recomputation takes longest in long windows, and recompute the
            rest. Has no effect with attention ``naive``, which is not one operator.

    Raises:
        ValueError: every is less than 1.
    """

    def __init__(self, every: int = 1, keep_attention: bool = False) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every, self.keep_attention = every, keep_attention

    def __call__(self, model: nn.Module) -> None:
        _language_model(model, type(self).__name__).checkpoint_activations(self.every, self.keep_attention)


class Freeze:
    """Freeze parameters: they get no gradient and are not passed to the optimizer.

    Args:
        patterns: regular expressions that are searched for in parameter names, such as ``embed_tokens``, or ``layers.[0-3].``
            for the first four layers.
        train: exceptions that stay trainable: ``patterns: [.], train: [norm]`` trains only norms.

    Raises:
        ValueError: an invalid regular expression.
    """

    def __init__(self, patterns: list[str], train: list[str] | None = None) -> None:
        self.patterns, self.train = patterns, train or []
        for pattern in (*self.patterns, *self.train):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"task.transforms: Freeze {pattern!r} is not a regular expression: {error}") from error

    def __call__(self, model: nn.Module) -> None:
        """Freeze parameters in place.

        Raises:
            ValueError: a pattern matches no parameter, or no trainable parameter is left.
        """
        parameters = dict(model.named_parameters())
        for pattern in (*self.patterns, *self.train):
            if not any(re.search(pattern, name) for name in parameters):
                raise ValueError(
                    f"task.transforms: Freeze {pattern!r} matches no parameter; an example of a name is {min(parameters)}"
                )
        for name, parameter in parameters.items():
            if any(re.search(p, name) for p in self.patterns) and not any(re.search(p, name) for p in self.train):
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in parameters.values()):
            raise ValueError(f"task.transforms: Freeze {self.patterns} leaves no trainable parameter")


class Compile:
    """Compile each block with torch.compile. Blocks share one graph; the first step is slow.

    Args:
        mode: mode of torch.compile: default, reduce-overhead or max-autotune.
    """

    def __init__(self, mode: str = "default") -> None:
        modes = ("default", "reduce-overhead", "max-autotune")
        if mode not in modes:
            raise ValueError(f"mode must be one of {', '.join(modes)}, got {mode!r}")
        self.mode = mode

    def __call__(self, model: nn.Module) -> None:
        for block in _language_model(model, type(self).__name__).blocks:
            BlockForward.of(block).compile(self.mode)


def _language_model(model: nn.Module, name: str) -> LanguageModel:
    if not isinstance(model, LanguageModel):
        raise ValueError(f"task.transforms: {name} supports Bumblebee and HuggingFaceModel, got {type(model).__name__}")
    return model
