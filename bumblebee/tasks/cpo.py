"""CPO: contrastive preference optimization (arXiv 2401.08417).

With the log-probability s of a response, a sum over its tokens, the loss of a step is

    - mean over pairs of [(1 - eps) log sigmoid(beta (s_chosen - s_rejected)) + eps log sigmoid(beta (s_rejected - s_chosen))]
    - sft_weight * mean over chosen tokens of log p

It is DPO with a uniform reference, and the language-modelling loss instead of a reference model. eps is 0 in the paper.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from bumblebee.tasks.preference_task import ReferenceFreeTask, check_numbers, smoothed_loss
from bumblebee.transforms import apply_transforms


class CPO(ReferenceFreeTask):
    """Contrastive preference optimization.

    Args:
        model: called as ``model(input_ids, position_ids=..., labels=...)``, returns token losses (2P, T).
        transforms: applied to the model in order, such as bumblebee.lora.LoRA.
        pref_beta: scale of the difference of log-probabilities.
        label_smoothing: assumed fraction of pairs with the wrong preference.
        sft_weight: weight of the language-modelling loss on the chosen responses; 0 turns it off.

    Raises:
        ValueError: a number out of range.
    """

    term, averaged = "cpo", False

    def __init__(
        self,
        model: nn.Module,
        transforms: list[Callable[[nn.Module], object]] | None = None,
        pref_beta: float = 0.1,
        label_smoothing: float = 0.0,
        sft_weight: float = 1.0,
    ) -> None:
        check_numbers(pref_beta, label_smoothing)
        self.model, self.transforms = model, apply_transforms(model, transforms)
        self.beta, self.label_smoothing = pref_beta, label_smoothing
        self._set_weights(sft_weight)

    def pair_loss(self, scores: Tensor) -> Tensor:
        """See the formula of the module: (P, 2) -> (P,)."""
        return smoothed_loss(self.beta * (scores[:, 0] - scores[:, 1]), self.label_smoothing)

    def summary(self) -> dict[str, object]:
        """The loss and the options in use."""
        in_use = {"label_smoothing": self.label_smoothing or None, "sft_weight": self.sft_weight or None}
        return {"loss": "cpo", "beta": self.beta, **in_use}
