"""SimPO: simple preference optimization (arXiv 2405.14734).

With the mean log-probability s of a response's tokens, the loss of a pair is

    -(1 - eps) log sigmoid(beta (s_chosen - s_rejected) - gamma) - eps log sigmoid(gamma - beta (s_chosen - s_rejected))

There is no reference model. eps, the assumed share of wrong preferences, is 0 in the paper.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from bumblebee.tasks.preference_task import ReferenceFreeTask, check_numbers, smoothed_loss
from bumblebee.transforms import apply_transforms


class SimPO(ReferenceFreeTask):
    """Simple preference optimization.

    Args:
        model: called as ``model(input_ids, position_ids=..., labels=...)``, returns token losses (2P, T).
        transforms: applied to the model in order, such as bumblebee.lora.LoRA.
        pref_beta: scale of the difference of mean log-probabilities; the paper uses 2 to 10.
        margin: gamma, by which the chosen response's reward should be larger; the paper uses 0.3 to 1.6.
        label_smoothing: assumed fraction of pairs with the wrong preference.
        sft_weight: weight of an additional language-modelling loss on the chosen responses; 0 turns it off.

    Raises:
        ValueError: a number out of range.
    """

    term, averaged = "simpo", True

    def __init__(
        self,
        model: nn.Module,
        transforms: list[Callable[[nn.Module], object]] | None = None,
        pref_beta: float = 2.0,
        margin: float = 1.0,
        label_smoothing: float = 0.0,
        sft_weight: float = 0.0,
    ) -> None:
        check_numbers(pref_beta, label_smoothing)
        if not margin >= 0:
            raise ValueError(f"margin must be at least 0, got {margin}")
        self.model, self.transforms = model, apply_transforms(model, transforms)
        self.beta, self.margin, self.label_smoothing = pref_beta, margin, label_smoothing
        self._set_weights(sft_weight)

    def pair_loss(self, scores: Tensor) -> Tensor:
        """See the formula of the module: (P, 2) -> (P,)."""
        return smoothed_loss(self.beta * (scores[:, 0] - scores[:, 1]) - self.margin, self.label_smoothing)

    def summary(self) -> dict[str, object]:
        """The loss and the options in use."""
        in_use = {"label_smoothing": self.label_smoothing or None, "sft_weight": self.sft_weight or None}
        return {"loss": "simpo", "beta": self.beta, "margin": self.margin, **in_use}
