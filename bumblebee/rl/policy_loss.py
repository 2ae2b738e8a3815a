"""The policy's loss: the loss of each sampled token, and how token losses are added up.

The gradient of a token's loss is that of

    -w A log p(token),    w = min(p(token) / p_sampled(token), importance_cap), a constant

Shapes: R completions (rows), T positions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bumblebee.datamodule import Batch
from bumblebee.nn import IGNORE_INDEX

Normalisation = Literal["sequence", "token", "constant", "sum"]


def token_losses(log_probs: Tensor, batch: Batch, importance_cap: float | None) -> Tensor:
    """Loss of each sampled token, 0 elsewhere: (R, T).

    Args:
        log_probs: of the targets, (R, T), with gradient.
        batch: from ``training_batch``, on the same device.
        importance_cap: largest weight of a token; None does not weight.
    """
    targets = batch["labels"] != IGNORE_INDEX
    drift = torch.where(targets, log_probs.detach() - batch["sampled_log_probs"], 0.0)
    weights = torch.ones_like(drift) if importance_cap is None else drift.exp().clamp(max=importance_cap)
    # p / p.detach() is 1; its gradient is that of log p.
    ratios = (log_probs - log_probs.detach()).exp()
    return torch.where(targets, -weights * batch["advantages"][:, None] * ratios, 0.0)


def loss_sum(losses: Tensor, batch: Batch, normalise: Normalisation) -> Tensor:
    """Sum of token losses (R, T), of each completion's mean for ``sequence``; to be divided by ``loss_divisor``."""
    if normalise != "sequence":
        return losses.sum()
    lengths = (batch["labels"] != IGNORE_INDEX).sum(dim=1)
    return (losses.sum(dim=1) / lengths.clamp(min=1)).sum()


def loss_divisor(normalise: Normalisation, completions: int, tokens: int, max_new_tokens: int) -> int:
    """What ``loss_sum`` is divided by, once it is added up over micro-batches and ranks."""
    return {"token": tokens, "constant": completions * max_new_tokens}.get(normalise, completions)


def token_sums(log_probs: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Sums over tokens that are logged, by metric."""
    log_probs = log_probs.detach()
    targets = batch["labels"] != IGNORE_INDEX
    drift = torch.where(targets, log_probs - batch["sampled_log_probs"], 0.0)
    return {"rl/logprob_drift": drift.abs().sum(), "rl/entropy": -log_probs.sum()}
