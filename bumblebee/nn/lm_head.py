"""The language-modeling head: logits, or the loss of each target.

The loss is computed inside the head's forward because under ZeRO-3 the head's weight is gathered only there. A task with
another loss of the targets' logits replaces it by ``LMHead.computing``; ``LMHead.summing_entropies`` adds the entropies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bumblebee.nn.linear_cross_entropy import LossWeighting, Positions, linear_cross_entropy
from bumblebee.nn.targets import select_rows, target_index

# Of hidden states (N, D), the weight (V, D) and labels (N,), in this order, where N is the number of targets.
TargetLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


class LMHead(nn.Linear):
    """Linear layer without bias from the hidden size to the vocabulary.

    Args:
        hidden_size: width of the input.
        vocab_size: number of logits.
    """

    target_loss: TargetLoss | None = None  # instead of token losses, see ``computing``
    entropy_sums: list[Tensor] | None = None  # see ``summing_entropies``

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.weighting = LossWeighting()

    @classmethod
    def adopt(cls, layer: nn.Module) -> None:
        """Turn a linear layer of another model into an LMHead in place. A layer with a bias is left unchanged."""
        if type(layer) is nn.Linear and layer.bias is None:
            layer.__class__ = cls
            layer.weighting = LossWeighting()

    @classmethod
    def find(cls, model: nn.Module) -> LMHead | None:
        """The head of a model; None if it has another kind of head."""
        return next((module for module in model.modules() if isinstance(module, cls)), None)

    @contextmanager
    def computing(self, loss: TargetLoss) -> Iterator[None]:
        """Inside, a forward pass with labels returns what ``loss`` returns."""
        self.target_loss = loss
        try:
            yield
        finally:
            del self.target_loss

    @contextmanager
    def summing_entropies(self) -> Iterator[list[Tensor]]:
        """Inside, each forward pass with labels appends a number to the list, in fp64 and without gradient.

        It is the sum over the targets of the entropy of the predicted distribution in nats.
        """
        sums: list[Tensor] = []
        self.entropy_sums = sums
        try:
            yield sums
        finally:
            del self.entropy_sums

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits, or token losses if labels are passed.

        Args:
            hidden: (B, T, hidden_size).
            labels: (B, T) ids; ``labels[b, t]`` is the token after position t, or -100 without a target.

        Returns:
            Logits (B, T, V) in the dtype of ``hidden``, or ``-log p(label)`` (B, T) in fp32, 0 where the label is -100.
        """
        if labels is None:
            return super().forward(hidden)
        # Only targets enter the matmul: prompts and padding cost nothing.
        index = target_index(labels)
        targets, weight = select_rows(hidden.flatten(0, -2), index), self.weight
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            targets, weight = targets.to(dtype), weight.to(dtype)
        target_labels = labels.flatten().index_select(0, index)
        if self.target_loss is not None:
            return self.target_loss(targets, weight, target_labels)
        entropies = None if self.entropy_sums is None else hidden.new_empty(len(index), dtype=torch.float32)
        positions = Positions(index, labels.numel())
        losses = linear_cross_entropy(targets, weight, target_labels, self.weighting, positions, entropies)
        if self.entropy_sums is not None and entropies is not None:
            self.entropy_sums.append(entropies.double().sum())
        return losses.view(labels.shape)
