"""The head of a reward model: one score for each position, as in transformers' ``ForSequenceClassification`` classes.

The score of a text is that of its last token, which has seen all others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class ScoreHead(nn.Linear):
    """Linear layer without bias from the hidden size to one score, computed in fp32.

    Args:
        hidden_size: width of the input.
        std: standard deviation of the initial weights, which depend on the seed only: they are the same on all ranks.
    """

    def __init__(self, hidden_size: int, std: float) -> None:
        self.std = std
        super().__init__(hidden_size, 1, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        generator = torch.Generator().manual_seed(torch.initial_seed())
        self.weight.copy_(torch.empty(self.weight.shape, device="cpu").normal_(std=self.std, generator=generator))

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """(..., hidden_size) -> (..., 1) in fp32.

        Raises:
            ValueError: labels were passed: the caller needs a language model.
        """
        if labels is not None:
            raise ValueError("a reward model scores texts and has no next-token loss: train it with bumblebee.RewardModel")
        with torch.autocast(hidden.device.type, enabled=False):
            return linear(hidden.float(), self.weight.float())
