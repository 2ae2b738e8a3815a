"""The reference for trial runs: a loop of plain torch on one device, in fp32, each step's rows as one batch.

Of the project it uses the model with the naive attention, for logits only, and the permutation of an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from bumblebee.config import BumblebeeConfig
from bumblebee.model import Bumblebee
from bumblebee.nn import IGNORE_INDEX
from bumblebee.training.loader import epoch_order
from bumblebee.verify.training_run import SEED, SHAPE, RandomTokens

Point = tuple[float, float]  # loss and gradient norm of a step


def gradient(rows: RandomTokens, weights: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Of the mean loss over all targets of all rows; on the CPU."""
    model = _model(weights, device)
    _mean_loss(model, rows, list(range(rows.samples)), device).backward()
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def adamw(
    rows: RandomTokens,
    weights: Mapping[str, Tensor],
    device: torch.device,
    rows_a_step: int,
    steps: int,
    lr: float,
    decay: float,
    clip: float,
    warmup: int,
    skipped: Collection[int] = (),
) -> tuple[list[Point], dict[str, Tensor]]:
    """AdamW (arXiv 1711.05101) with a warm-up, half a cosine and clipping. Each step's point, and the weights, on the CPU.

    Args:
        rows: to train on.
        weights: to begin with.
        device: where.
        rows_a_step: rows of a whole step; an epoch's last step has what is left.
        steps: how many.
        lr: highest learning rate.
        decay: weight decay of the matrices.
        clip: largest gradient norm.
        warmup: steps in which the rate rises from 0.
        skipped: steps whose update is left out, as fp16 does while it looks for its loss scale.
    """
    model = _model(weights, device)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    points = []
    for step, chosen in enumerate(_rows_of_steps(rows.samples, rows_a_step, steps)):
        loss = _mean_loss(model, rows, chosen, device)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        rising, falling = step / warmup, 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = lr * (rising if step < warmup else falling)
        if step not in skipped:
            optimizer.step()
        points.append((loss.item(), norm.item()))
    return points, {name: p.detach().cpu() for name, p in model.named_parameters()}


def _model(weights: Mapping[str, Tensor], device: torch.device) -> Bumblebee:
    model = Bumblebee(BumblebeeConfig(**SHAPE), attention="naive")
    model.load_state_dict(dict(weights))
    return model.to(device)


def _rows_of_steps(samples: int, rows_a_step: int, steps: int) -> list[list[int]]:
    found: list[list[int]] = []
    epoch = 0
    while len(found) < steps:
        order = epoch_order(samples, SEED, epoch).tolist()
        found += [order[first : first + rows_a_step] for first in range(0, samples, rows_a_step)]
        epoch += 1
    return found[:steps]


def _mean_loss(model: Bumblebee, rows: RandomTokens, chosen: list[int], device: torch.device) -> Tensor:
    batch = {name: tensor.to(device) for name, tensor in rows.collate(chosen).items()}
    logits, labels = model(batch["input_ids"], batch["position_ids"]), batch["labels"]
    total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum()
