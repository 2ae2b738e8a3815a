"""Arithmetic of preference batches: rows 2i and 2i + 1 are the chosen and the rejected response of pair i.

Shapes: P pairs, T positions. All numbers are fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bumblebee.datamodule import Batch
from bumblebee.nn import IGNORE_INDEX


def response_log_probabilities(model: Any, batch: Batch) -> Tensor:
    """log p of each target of each row, zero where there is none: (2P, T). Full logits are never made."""
    return -model(batch["input_ids"], position_ids=batch["position_ids"], labels=batch["labels"])


def lengths(batch: Batch) -> Tensor:
    """Targets of each response: (P, 2), chosen and rejected."""
    return (batch["labels"] != IGNORE_INDEX).sum(1).view(-1, 2)


def trained_pairs(batch: Batch) -> Tensor:
    """Which pairs have something to compare, which is a target on both sides: (P,) bool."""
    return (lengths(batch) > 0).all(1)


def sums(token_log_probabilities: Tensor) -> Tensor:
    """(2P, T) -> log p of each response: (P, 2), chosen and rejected."""
    return token_log_probabilities.sum(1).view(-1, 2)


def discounted_sums(token_log_probabilities: Tensor, batch: Batch, alpha: float) -> Tensor:
    """Like ``sums``, the tokens beyond the shorter response's length counted ``alpha`` times (arXiv 2409.06411)."""
    targets = batch["labels"] != IGNORE_INDEX
    shorter = lengths(batch).amin(1).repeat_interleave(2)  # (2P,)
    beyond = targets.cumsum(1) > shorter[:, None]
    return sums(torch.where(beyond, alpha * token_log_probabilities, token_log_probabilities))
