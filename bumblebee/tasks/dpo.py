"""DPO: direct preference optimization (arXiv 2305.18290).

With the implicit reward margin of a pair

    h = [log p(chosen) - log p_reference(chosen)] - [log p(rejected) - log p_reference(rejected)]

the loss of a pair is one of

    sigmoid     -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)     eps: dpo_label_smoothing (arXiv 2305.18290)
    ipo         (h - 1 / (2 beta))^2                                          arXiv 2310.12036, equation 17
    hinge       max(0, 1 - beta h)                                            arXiv 2305.10425
    robust      [-(1 - eps) log sigmoid(beta h) + eps log sigmoid(-beta h)] / (1 - 2 eps)             arXiv 2403.00409

log p is the sum over the response's tokens, or their mean with ``length_normalised``.
Shapes: P pairs, T positions; (P, 2) is chosen and rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from bumblebee.datamodule import Batch
from bumblebee.tasks.pair_log_probs import (
    length_desensitized_log_probs,
    response_lengths,
    response_log_probs,
    token_log_probs,
    valid_pairs,
)
from bumblebee.tasks.preference_task import PreferenceTask, check_beta, smoothed_loss
from bumblebee.tasks.referenced_task import ReferencedTask
from bumblebee.tasks.task import ForwardFn
from bumblebee.transforms import apply_transforms


class DPO(ReferencedTask, PreferenceTask):
    """Direct preference optimization.

    Batches hold ``input_ids``, ``labels`` (already shifted; -100 is ignored) and ``position_ids``, each (2P, T) int64, and
    ``index`` (P,). Rows 2i and 2i + 1 are the chosen and the rejected response of pair i, which is pair index[i] of the data.

    Args:
        model: called as ``model(input_ids, position_ids=..., labels=...)``, returns token losses (2P, T).
        transforms: applied to the model in order, such as bumblebee.lora.LoRA.
        pref_beta: beta of the loss; larger values keep the model closer to the reference.
        loss_type: sigmoid, ipo, hinge or robust.
        dpo_label_smoothing: assumed fraction of pairs with the wrong preference; sigmoid and robust only.
        length_normalised: use the mean instead of the sum over a response's tokens, as the authors of IPO do in practice.
        sft_weight: weight of an additional language-modelling loss on the chosen responses; 0 turns it off.
        ld_alpha: weight of the policy's log-probabilities beyond the shorter response's length (LD-DPO); 1 turns it off.
        reference: adapters_off (the model without its adapters), copy (the initial model), the folder of another model, or
            auto: adapters_off if the model has adapters, else copy.
        precompute_reference: compute the reference's log-probabilities once, before training, and cache them on disk.
        cache_dir: folder of that cache; by default $BUMBLEBEE_CACHE or ~/.cache/bumblebee.

    Raises:
        ValueError: a number out of range, or a reference folder that does not exist.
    """

    term = "dpo"

    def __init__(
        self,
        model: nn.Module,
        transforms: list[Callable[[nn.Module], Any]] | None = None,
        pref_beta: float = 0.1,
        loss_type: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid",
        dpo_label_smoothing: float = 0.0,
        length_normalised: bool = False,
        sft_weight: float = 0.0,
        ld_alpha: float = 1.0,
        reference: str = "auto",
        precompute_reference: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        _check(pref_beta, loss_type, dpo_label_smoothing, ld_alpha)
        self.model, self.transforms = model, apply_transforms(model, transforms)
        self.pref_beta, self.dpo_label_smoothing = pref_beta, dpo_label_smoothing
        self.loss_type, self.length_normalised = loss_type, length_normalised
        self.ld_alpha = ld_alpha
        self._set_weights(sft_weight)
        self._set_reference(reference, precompute_reference, cache_dir)
        losses = {"sigmoid": self._sigmoid, "ipo": self._ipo, "hinge": self._hinge, "robust": self._robust}
        self.pair_loss = losses[loss_type]

    def summary(self) -> dict[str, object]:
        """The loss, the options in use, and the reference."""
        in_use = {
            "label_smoothing": self.dpo_label_smoothing or None,
            "tokens": "averaged" if self.length_normalised else None,
            "sft_weight": self.sft_weight or None,
            "ld_alpha": self.ld_alpha if self.ld_alpha < 1 else None,
        }
        return {"loss": self.loss_type, "beta": self.pref_beta, **in_use, "reference": self.describe_reference()}

    # -- a step --------------------------------------------------------------------------------------------------------

    def _step(self, model: ForwardFn, batch: Batch, split: str) -> dict[str, Tensor]:
        assert self.reference_model is not None, "begin has not been called"
        reference = self.reference_model(model, batch, split)
        tokens = token_log_probs(model, batch)
        valid = valid_pairs(batch)
        margins = self._margins(tokens, reference, batch)
        # where() inside and outside: an invalid pair must not contribute to the gradient, not even NaN.
        losses = torch.where(valid, self.pair_loss(torch.where(valid, margins, 0.0)), 0.0)
        return self._sums(tokens, losses, self.pref_beta * (response_log_probs(tokens) - reference), valid)

    def _margins(self, tokens: Tensor, reference: Tensor, batch: Batch) -> Tensor:
        """The margin h of each pair: (2P, T) and (P, 2) -> (P,)."""
        policy = response_log_probs(tokens)
        if self.ld_alpha < 1:
            policy = length_desensitized_log_probs(tokens, batch, self.ld_alpha)
        ratios = policy - reference
        if self.length_normalised:
            ratios = ratios / response_lengths(batch).clamp(min=1)
        return ratios[:, 0] - ratios[:, 1]

    # -- loss of a pair with margin h ------------------------------------------------------------------------------------

    def _sigmoid(self, h: Tensor) -> Tensor:
        return smoothed_loss(self.pref_beta * h, self.dpo_label_smoothing)

    def _robust(self, h: Tensor) -> Tensor:
        eps, scaled = self.dpo_label_smoothing, self.pref_beta * h
        return ((1 - eps) * -logsigmoid(scaled) + eps * logsigmoid(-scaled)) / (1 - 2 * eps)

    def _ipo(self, h: Tensor) -> Tensor:
        return (h - 1 / (2 * self.pref_beta)) ** 2

    def _hinge(self, h: Tensor) -> Tensor:
        return torch.relu(1 - self.pref_beta * h)


def _check(beta: float, loss_type: str, smoothing: float, ld_alpha: float) -> None:
    check_beta(beta)
    if loss_type not in ("sigmoid", "ipo", "hinge", "robust"):
        raise ValueError(f"loss_type must be sigmoid, ipo, hinge or robust, got {loss_type!r}")
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"dpo_label_smoothing must be in [0, 0.5), got {smoothing}")
    if smoothing and loss_type not in ("sigmoid", "robust"):
        raise ValueError(f"dpo_label_smoothing works with loss_type sigmoid and robust only, not with {loss_type}")
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha must be in [0, 1], got {ld_alpha}")
