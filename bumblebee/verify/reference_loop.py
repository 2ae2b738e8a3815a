"""Reference loop: training in plain PyTorch on one device, each step's samples as one batch.

From Bumblebee it uses the model, for logits only, and the permutation of an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bumblebee.datamodule import Batch
from bumblebee.nn import IGNORE_INDEX
from bumblebee.training.loader import epoch_order


class StepMetrics(NamedTuple):
    """Metrics of one optimizer step."""

    loss: float  # mean over the targets of the step
    grad_norm: float  # before clipping


def sample_indices(num_samples: int, samples_per_step: int, steps: int, seed: int) -> list[list[int]]:
    """Sample indices of each step: shuffled epochs, whose last step has the remaining samples."""
    indices: list[list[int]] = []
    epoch = 0
    while len(indices) < steps:
        order = epoch_order(num_samples, seed, epoch).tolist()
        indices += [order[begin : begin + samples_per_step] for begin in range(0, num_samples, samples_per_step)]
        epoch += 1
    return indices[:steps]


def mean_loss(model: Callable[..., Tensor], batch: Batch) -> Tensor:
    """Cross-entropy averaged over all targets of a batch."""
    logits, labels = model(batch["input_ids"], batch["position_ids"]), batch["labels"]
    total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum()


def gradient(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Gradient of the mean loss of a batch, on the CPU."""
    mean_loss(model, batch).backward()
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def train_adamw(
    model: nn.Module,
    batches: Iterable[Batch],
    lr: float,
    weight_decay: float,
    clip: float,
    lr_factor: Callable[[int], float],
    skipped: Collection[int] = (),
) -> list[StepMetrics]:
    """Train with AdamW (arXiv 1711.05101) and gradient clipping. Embeddings and vectors have no weight decay.

    Args:
        model: changed in place.
        batches: one per step. Steps without targets are left out, also of the result.
        lr: learning rate before ``lr_factor``.
        weight_decay: of the matrices.
        clip: maximum gradient norm.
        lr_factor: of each step, counted from 0.
        skipped: steps without an update, as fp16 skips them while it searches for its loss scale.
    """
    parameters = dict(model.named_parameters())
    decayed = [p for name, p in parameters.items() if p.ndim == 2 and "embed" not in name]
    not_decayed = [p for name, p in parameters.items() if p.ndim == 1 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    metrics = []
    for step, batch in enumerate(batches):
        if not bool((batch["labels"] != IGNORE_INDEX).any()):
            continue
        loss = mean_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(step)
        if step not in skipped:
            optimizer.step()
        metrics.append(StepMetrics(loss.item(), norm.item()))
    return metrics


def cosine_factor(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up from 0, then half a cosine (arXiv 1608.03983, without restarts)."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
