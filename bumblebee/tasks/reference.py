"""References: the model that a policy is compared with, and its log-probabilities of the responses.

A reference is called with a batch and the name of the samples it comes from ("train" or "validation"), and gives the sums of
log-probabilities of each pair's responses, (P, 2) in fp32. It never drops out and has no gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bumblebee.datamodule import Batch
from bumblebee.tasks.pair_log_probs import response_log_probabilities, sums


class Reference(ABC):
    """What the policy is compared with."""

    @abstractmethod
    def __call__(self, model: Any, batch: Batch, samples: str) -> Tensor:
        """log p of the responses: (P, 2). At stage 3 collective.

        Args:
            model: the one that is trained, as the task is given it.
            batch: on the model's device.
            samples: "train" or "validation".
        """

    def close(self) -> None:  # noqa: B027  (optional)
        """Let go of a model that nothing else needs."""


class Policy(Reference):
    """The trained model itself, as a context makes it: with its adapters off, or before it has learnt anything.

    Args:
        module: the model.
        context: called with it.
    """

    def __init__(self, module: nn.Module, context: Callable[[nn.Module], AbstractContextManager[Any]]) -> None:
        self.module, self.context = module, context

    @torch.no_grad()
    def __call__(self, model: Any, batch: Batch, samples: str) -> Tensor:
        with evaluating(self.module), self.context(self.module):
            return sums(response_log_probabilities(model, batch))


class Frozen(Reference):
    """Another model.

    Args:
        model: what ``Trainer.frozen`` gives.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, model: Any, batch: Batch, samples: str) -> Tensor:
        return sums(response_log_probabilities(self.model, batch))

    def close(self) -> None:
        self.model.close()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each part is in the mode it was in."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training
