"""The policy's loss: the loss of each sampled token, and how token losses are added up.

With the ratio of the policy to that of the rollout batch's first step, of a token, r = p / p_old, or of a completion,
r = exp(mean over its tokens of log(p / p_old)) (GSPO, arXiv 2507.18071), the loss of a token is -w S + kl_beta K, where S is

    clip     min(r A, clamp(r, 1 - clip, 1 + clip_high) A)      PPO, arXiv 1707.06347; clip_high: DAPO, 2503.14476
    cispo    A log p * min(r, 1 + clip_high), a constant        CISPO, arXiv 2506.13585
    sapo     A sigmoid(t (r - 1)) 4 / t, t by the sign of A     SAPO, arXiv 2511.20347

Without clipping, S = r A. In the first step r is 1, and the gradient of S is that of A log p. The constant

    w = min(p_old / p_sampled, importance_cap)

corrects for the rounding between the engine that samples and the training forward pass. K estimates the KL divergence of the
policy from the reference, with x = log(p_reference / p) (http://joschu.net/blog/kl-approx.html):

    k1    -x                  k2    x^2 / 2                  k3    exp(x) - x - 1

The gradient of these averages is not that of the divergence: that of k1 is 0 on average. With ``kl_correction`` they are
multiplied by r, so that it is (arXiv 2512.02556). Token losses are added up in one of these ways:

    sequence    mean over completions of the mean over a completion's tokens        GRPO, arXiv 2402.03300
    token       mean over the tokens of all completions of the step                 DAPO
    constant    sum / (completions * max_new_tokens)                                Dr. GRPO, arXiv 2503.20783
    sum         mean over completions of the sum over a completion's tokens         RLOO, arXiv 2402.14740

Shapes: R completions (rows), T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bumblebee.datamodule import Batch
from bumblebee.nn import IGNORE_INDEX

Normalisation = Literal["sequence", "token", "constant", "sum"]
Surrogate = Literal["clip", "cispo", "sapo"]
RatioLevel = Literal["token", "sequence"]
KLEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of each sampled token; see the formulas of the module.

    Args:
        surrogate: clip, cispo or sapo.
        ratio: of a token or of a whole completion (sequence).
        clip: how far ratios may fall below 1; None does not clip.
        clip_high: how far they may rise above 1; None for ``clip``.
        sapo_temperatures: t for positive and for negative advantages.
        importance_cap: largest w; None does not weight.
        kl_beta: weight of the KL term; 0 for none.
        kl_estimator: k1, k2 or k3.
        kl_correction: whether it is multiplied by the ratio.

    Raises:
        ValueError: a number out of range, or options that exclude each other.
    """

    surrogate: Surrogate = "clip"
    ratio: RatioLevel = "token"
    clip: float | None = 0.2
    clip_high: float | None = None
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    importance_cap: float | None = 2.0
    kl_beta: float = 0.0
    kl_estimator: KLEstimator = "k3"
    kl_correction: bool = True

    def __post_init__(self) -> None:
        if self.clip is not None and not 0 < self.clip < 1:
            raise ValueError(f"clip must be between 0 and 1, or null for none; got {self.clip}")
        if self.clip_high is not None and not self.clip_high > 0:
            raise ValueError(f"clip_high must be more than 0, got {self.clip_high}")
        if self.clip_high is not None and (self.clip is None or self.surrogate == "sapo"):
            raise ValueError(f"clip_high: {self.clip_high} has no effect with {'clip: null' if self.clip is None else 'sapo'}")
        if self.surrogate == "cispo" and self.clip is None:
            raise ValueError("surrogate: cispo limits ratios to 1 + clip_high: set clip_high or clip")
        if not min(self.sapo_temperatures) > 0:
            raise ValueError(f"sapo_temperatures must be more than 0, got {list(self.sapo_temperatures)}")
        if self.importance_cap is not None and not self.importance_cap >= 1:
            raise ValueError(f"importance_cap must be at least 1, got {self.importance_cap}")
        if not self.kl_beta >= 0:
            raise ValueError(f"kl_beta must be at least 0, got {self.kl_beta}")

    def __str__(self) -> str:
        """Options in use, for the run summary."""
        limits = [f"{name} {value:.4g}" for name, value in (("from", self.lowest_ratio), ("to", self.highest_ratio)) if value]
        return f"{self.surrogate}, ratios of each {self.ratio} {' '.join(limits)}".rstrip()

    @property
    def highest_ratio(self) -> float | None:
        """The ratio above which a positive advantage has no more effect; None without clipping."""
        high = self.clip if self.clip_high is None else self.clip_high
        return None if high is None or self.surrogate == "sapo" else 1 + high

    @property
    def lowest_ratio(self) -> float | None:
        """The ratio below which a negative advantage has no more effect; None without clipping."""
        return 1 - self.clip if self.clip is not None and self.surrogate == "clip" else None

    def __call__(self, log_probs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of the sampled tokens, 0 elsewhere: (R, T); and sums of what is logged, by metric.

        Args:
            log_probs: of the targets, (R, T), with gradient.
            batch: from ``training_batch``, on the same device; with old_log_probs (R, T) after the first step, and
                reference_log_probs (R, T) for the KL term.
        """
        targets = batch["labels"] != IGNORE_INDEX
        old = batch.get("old_log_probs", log_probs.detach())
        drift = torch.where(targets, old - batch["sampled_log_probs"], 0.0)
        weights = torch.ones_like(drift) if self.importance_cap is None else drift.exp().clamp(max=self.importance_cap)
        ratios = self._ratios(torch.where(targets, log_probs - old, 0.0), targets)
        surrogate = self._surrogate(ratios, log_probs, weights * batch["advantages"][:, None])
        losses = torch.where(targets, -surrogate, 0.0)
        # The mean of -log p over sampled tokens estimates the entropy; the task replaces it where the head computes it.
        sums = {"rl/logprob_drift": drift.abs().sum(), "rl/entropy": -log_probs.detach().sum()}
        if "old_log_probs" in batch:
            sums |= self._ratio_sums(ratios.detach(), batch["advantages"][:, None], targets)
        if self.kl_beta:
            divergences = torch.where(targets, self._divergences(log_probs, batch["reference_log_probs"], ratios), 0.0)
            losses = losses + self.kl_beta * divergences
            sums["rl/kl"] = divergences.detach().sum()
        return losses, sums

    def _ratios(self, log_ratios: Tensor, targets: Tensor) -> Tensor:
        """(R, T), or (R, 1) of whole completions."""
        if self.ratio == "sequence":
            log_ratios = (log_ratios.sum(dim=1) / targets.sum(dim=1).clamp(min=1))[:, None]
        return log_ratios.exp()

    def _surrogate(self, ratios: Tensor, log_probs: Tensor, advantages: Tensor) -> Tensor:
        """The objective of each token, (R, T), with advantages (R, T)."""
        if self.surrogate == "cispo":
            return advantages * ratios.detach().clamp(max=self.highest_ratio) * log_probs
        if self.surrogate == "sapo":
            temperatures = torch.where(advantages > 0, *self.sapo_temperatures)
            return advantages * torch.sigmoid(temperatures * (ratios - 1)) * 4 / temperatures
        clipped = ratios.clamp(self.lowest_ratio, self.highest_ratio) if self.clip is not None else ratios
        return advantages * torch.where(advantages * clipped < advantages * ratios, clipped, ratios)

    def _divergences(self, log_probs: Tensor, reference: Tensor, ratios: Tensor) -> Tensor:
        x = reference - log_probs
        estimates = {"k1": lambda: -x, "k2": lambda: x.square() / 2, "k3": lambda: x.exp() - x - 1}
        divergences = estimates[self.kl_estimator]()
        return divergences * ratios if self.kl_correction else divergences

    def _ratio_sums(self, ratios: Tensor, advantages: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Sums of ratios, and of how many are clipped: over tokens, or over completions."""
        counted = targets if self.ratio == "token" else targets.any(dim=1, keepdim=True)
        sums = {"rl/ratio": torch.where(counted, ratios, 0.0).sum()}
        zero = torch.zeros_like(sums["rl/ratio"])
        low, high = self.lowest_ratio, self.highest_ratio
        if self.surrogate != "sapo":
            is_low = counted & (advantages < 0)
            sums["rl/clipped_low"] = zero if low is None else (is_low & (ratios < low)).sum()
            is_high = counted & (advantages > 0)
            sums["rl/clipped_high"] = zero if high is None else (is_high & (ratios > high)).sum()
            sums["rl/clipped"] = sums["rl/clipped_low"] + sums["rl/clipped_high"]
        return sums

    def units(self, off_policy: bool) -> dict[str, str]:
        """What the logged sums are divided by.

        Args:
            off_policy: whether several steps are taken on a rollout batch.
        """
        of_ratio = "tokens" if self.ratio == "token" else "trained"
        clipped = [] if self.surrogate == "sapo" else ["rl/clipped", "rl/clipped_low", "rl/clipped_high"]
        return {
            **dict.fromkeys(["rl/logprob_drift", "rl/entropy", *(["rl/kl"] if self.kl_beta else [])], "tokens"),
            **(dict.fromkeys(["rl/ratio", *clipped], of_ratio) if off_policy else {}),
        }


def loss_sum(losses: Tensor, batch: Batch, normalise: Normalisation) -> Tensor:
    """Sum of token losses (R, T), of each completion's mean for ``sequence``; to be divided by ``loss_divisor``."""
    if normalise != "sequence":
        return losses.sum()
    lengths = (batch["labels"] != IGNORE_INDEX).sum(dim=1)
    return (losses.sum(dim=1) / lengths.clamp(min=1)).sum()


def loss_divisor(normalise: Normalisation, completions: int, tokens: int, max_new_tokens: int) -> int:
    """What ``loss_sum`` is divided by, once it is added up over micro-batches and ranks."""
    return {"token": tokens, "constant": completions * max_new_tokens}.get(normalise, completions)
