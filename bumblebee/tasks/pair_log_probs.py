"""Log-probabilities of preference pairs: rows 2i and 2i + 1 are the chosen and the rejected response of pair i.

Shapes: P pairs, T positions; (P, 2) is chosen and rejected. Log-probabilities are fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bumblebee.datamodule import Batch
from bumblebee.nn import IGNORE_INDEX
from bumblebee.nn.batch_invariant import is_batch_invariant
from bumblebee.nn.targets import scatter_rows
from bumblebee.tasks.task import ForwardFn


def token_log_probs(model: ForwardFn, batch: Batch) -> Tensor:
    """Log-probability of each target, zero elsewhere: (2P, T). The logits are never materialized.

    Of a batch with a packed form, that is what the model computes, unless batch invariance asks for rows.
    """
    if "packed_input_ids" in batch and not is_batch_invariant():
        ids, positions, labels = (batch[f"packed_{name}"] for name in ("input_ids", "position_ids", "labels"))
        losses = model(ids, position_ids=positions, labels=labels)
        shape = batch["labels"].shape
        return scatter_rows(-losses.view(-1, 1), batch["packed_places"], shape[0] * shape[1]).view(shape)
    return -model(batch["input_ids"], position_ids=batch["position_ids"], labels=batch["labels"])


def response_lengths(batch: Batch) -> Tensor:
    """Number of targets of each response: (P, 2)."""
    return (batch["labels"] != IGNORE_INDEX).sum(1).view(-1, 2)


def valid_pairs(batch: Batch) -> Tensor:
    """Which pairs have targets in both responses: (P,) bool."""
    return (response_lengths(batch) > 0).all(1)


def response_log_probs(token_log_probs: Tensor) -> Tensor:
    """Sum over each response's tokens: (2P, T) -> (P, 2)."""
    return token_log_probs.sum(1).view(-1, 2)


def length_desensitized_log_probs(token_log_probs: Tensor, batch: Batch, alpha: float) -> Tensor:
    """``response_log_probs`` with tokens beyond the shorter response's length weighted by ``alpha`` (arXiv 2409.06411)."""
    targets = batch["labels"] != IGNORE_INDEX
    shorter = response_lengths(batch).amin(1).repeat_interleave(2)  # (2P,)
    beyond = targets.cumsum(1) > shorter[:, None]
    return response_log_probs(torch.where(beyond, alpha * token_log_probs, token_log_probs))
