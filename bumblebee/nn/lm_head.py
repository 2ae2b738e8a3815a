"""The output head: logits, or the loss of each target.

The loss is computed inside the head's forward because under ZeRO-3 the head's weight is whole only there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bumblebee.nn import IGNORE_INDEX
from bumblebee.nn.linear_cross_entropy import Weighing, linear_cross_entropy


class Head(nn.Linear):
    """A linear layer without bias from the hidden size to the vocabulary.

    Args:
        hidden_size: width of the input.
        vocab_size: number of logits.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.weighing = Weighing()

    @classmethod
    def adopt(cls, layer: nn.Module) -> None:
        """Make a linear layer of another model, which stays where it is, a head. One with biases is left as it is."""
        if type(layer) is nn.Linear and layer.bias is None:
            layer.__class__ = cls
            layer.weighing = Weighing()

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits, or token losses where labels are given.

        Args:
            hidden: (B, T, hidden_size).
            labels: (B, T) ids; ``labels[b, t]`` is the token that should follow position t, -100 where there is none.

        Returns:
            Logits (B, T, V) in the dtype of ``hidden``, or ``-log p(label)`` (B, T) in fp32, zero where the label is -100.
        """
        if labels is None:
            return super().forward(hidden)
        # Only targets reach the matrix product: prompts and padding cost nothing. On a GPU the indexing waits for it once.
        where = labels != IGNORE_INDEX
        targets, weight = hidden[where], self.weight
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            targets, weight = targets.to(dtype), weight.to(dtype)
        losses = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
        losses[where] = linear_cross_entropy(targets, weight, labels[where], self.weighing)
        return losses
