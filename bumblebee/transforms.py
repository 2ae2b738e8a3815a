"""Transforms: what is done to a model before it is trained, named in a recipe under ``task.transforms``.

A transform is called with the model and changes it in place; a function of one's own serves as well. State-dict keys stay as
they are, so folders do not depend on transforms.
"""

from __future__ import annotations

import re

from torch import nn

from bumblebee.models.base import LanguageModel


class ActivationCheckpointing:
    """Compute blocks again in the backward pass instead of keeping what they computed (arXiv 1604.06174).

    Args:
        every: 1 for all blocks, 2 for every second, and so on: less memory saved, less time lost.

    Raises:
        ValueError: every is less than 1.
    """

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every = every

    def __call__(self, model: nn.Module) -> None:
        _language_model(model, type(self).__name__).checkpoint_activations(self.every)


class Freeze:
    """Leave parameters as they are: they get no gradient, and the optimizer does not see them.

    Args:
        patterns: regular expressions, searched for in the names of parameters: ``embed_tokens``, or ``layers.[0-3].`` for the
            first four layers.
        train: expressions for what is trained all the same, so that ``patterns: [.], train: [norm]`` trains norms only.

    Raises:
        ValueError: an expression that is none.
    """

    def __init__(self, patterns: list[str], train: list[str] | None = None) -> None:
        self.patterns, self.train = patterns, train or []
        for pattern in (*self.patterns, *self.train):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"task.transforms: Freeze {pattern!r} is no regular expression: {error}") from error

    def __call__(self, model: nn.Module) -> None:
        """Freeze, in place.

        Raises:
            ValueError: an expression that matches no parameter, or nothing left to train.
        """
        parameters = dict(model.named_parameters())
        for pattern in (*self.patterns, *self.train):
            if not any(re.search(pattern, name) for name in parameters):
                raise ValueError(
                    f"task.transforms: Freeze {pattern!r} matches no parameter; they are named like {min(parameters)}"
                )
        for name, parameter in parameters.items():
            if any(re.search(p, name) for p in self.patterns) and not any(re.search(p, name) for p in self.train):
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in parameters.values()):
            raise ValueError(f"task.transforms: Freeze {self.patterns} leaves nothing to train")


class Compile:
    """Compile each block with torch.compile: the blocks are alike, so one graph serves all. The first step takes long.

    Args:
        mode: of torch.compile: default, reduce-overhead or max-autotune.
    """

    def __init__(self, mode: str = "default") -> None:
        known = ("default", "reduce-overhead", "max-autotune")
        if mode not in known:
            raise ValueError(f"mode must be one of {', '.join(known)}, got {mode!r}")
        self.mode = mode

    def __call__(self, model: nn.Module) -> None:
        for block in _language_model(model, type(self).__name__).blocks:
            block.compile(mode=self.mode)  # in place: unlike torch.compile(block), this renames no parameter


def _language_model(model: nn.Module, name: str) -> LanguageModel:
    if not isinstance(model, LanguageModel):
        raise ValueError(f"task.transforms: {name} works on Bumblebee and HuggingFaceModel, got {type(model).__name__}")
    return model
