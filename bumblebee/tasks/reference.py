"""Reference models: what DPO and GRPO compare the policy with.

A reference is called with a batch and the split that it comes from ("train" or "validation"), and returns the log-probability
of each response, (P, 2) in fp32, without dropout and without gradients. One that is a model also yields those of each token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from bumblebee.datamodule import Batch
from bumblebee.tasks.pair_log_probs import response_log_probs, token_log_probs
from bumblebee.tasks.task import ForwardFn


class Reference(ABC):
    """Log-probabilities of a reference model."""

    @abstractmethod
    def __call__(self, model: ForwardFn, batch: Batch, split: str) -> Tensor:
        """Log-probability of each response: (P, 2). Collective at stage 3.

        Args:
            model: the trained model, as ``training_step`` receives it.
            batch: on the model's device.
            split: "train" or "validation".
        """

    def close(self) -> None:  # noqa: B027  (optional)
        """Release a model that nothing else needs."""


class PolicyReference(Reference):
    """The trained model itself inside a context: with its adapters disabled, or before its first step.

    Args:
        module: the model.
        context: called with it, returns the context manager.
    """

    def __init__(self, module: nn.Module, context: Callable[[nn.Module], AbstractContextManager[object]]) -> None:
        self.module, self.context = module, context

    def __call__(self, model: ForwardFn, batch: Batch, split: str) -> Tensor:
        return response_log_probs(self.token_log_probs(model, batch))

    @torch.no_grad()
    def token_log_probs(self, model: ForwardFn, batch: Batch) -> Tensor:
        """Log-probability of each target, zero elsewhere: (R, T). Collective at stage 3."""
        with evaluation_mode(self.module), self.context(self.module):
            return token_log_probs(model, batch)


class FrozenReference(Reference):
    """Another model.

    Args:
        model: in evaluation mode.
        close: releases the model.
    """

    def __init__(self, model: ForwardFn, close: Callable[[], None] = lambda: None) -> None:
        self.model, self._close = model, close

    def __call__(self, model: ForwardFn, batch: Batch, split: str) -> Tensor:
        return response_log_probs(self.token_log_probs(model, batch))

    @torch.no_grad()
    def token_log_probs(self, model: ForwardFn, batch: Batch) -> Tensor:
        """Log-probability of each target, zero elsewhere: (R, T). Collective at stage 3."""
        return token_log_probs(self.model, batch)

    def close(self) -> None:
        self._close()


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode, and restore each submodule's mode afterwards."""
    before = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in before:
            submodule.training = training
