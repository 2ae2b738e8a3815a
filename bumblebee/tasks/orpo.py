"""ORPO: odds ratio preference optimization, fine-tuning and alignment in one run (arXiv 2403.07691).

With the mean log-probability s of a response's tokens, and log odds(s) = s - log(1 - exp s), the loss of a step is

    - mean over chosen tokens of log p - beta * mean over pairs of log sigmoid(log odds(s_chosen) - log odds(s_rejected))

The paper calls beta lambda. There is no reference model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from bumblebee.tasks.preference_task import ReferenceFreeTask, check_beta
from bumblebee.transforms import apply_transforms

_LARGEST = -1e-6  # the odds of probability 1 are infinite


class ORPO(ReferenceFreeTask):
    """Odds ratio preference optimization.

    Args:
        model: called as ``model(input_ids, position_ids=..., labels=...)``, returns token losses (2P, T).
        transforms: applied to the model in order, such as bumblebee.lora.LoRA.
        pref_beta: weight of the odds ratio's loss beside the language-modelling loss.

    Raises:
        ValueError: pref_beta is not more than 0.
    """

    term, averaged = "orpo", True

    def __init__(
        self, model: nn.Module, transforms: list[Callable[[nn.Module], object]] | None = None, pref_beta: float = 0.1
    ) -> None:
        check_beta(pref_beta)
        self.model, self.transforms = model, apply_transforms(model, transforms)
        self.beta = pref_beta
        self._set_weights(sft_weight=1.0)
        self.weights[self.term] = pref_beta

    def pair_loss(self, scores: Tensor) -> Tensor:
        """-log sigmoid of the logarithm of the odds ratio: (P, 2) -> (P,)."""
        odds = log_odds(scores)
        return -logsigmoid(odds[:, 0] - odds[:, 1])

    def summary(self) -> dict[str, object]:
        """The loss and its weight."""
        return {"loss": "odds ratio and SFT", "beta": self.beta}


def log_odds(log_probs: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p, without loss of digits near p = 0 and p = 1."""
    log_probs = log_probs.clamp(max=_LARGEST)
    near_one = log_probs > -math.log(2)
    # where() inside as well: the gradient of the branch that is not taken must be finite.
    small, large = torch.where(near_one, -1.0, log_probs), torch.where(near_one, log_probs, -1.0)
    return log_probs - torch.where(near_one, torch.log(-torch.expm1(large)), torch.log1p(-torch.exp(small)))
