"""The reference: the loop of a textbook, on one device, without DeepSpeed, plan, loader, task or parameter groups of ours.

Only two things are taken from the project: the model, and the permutation of an epoch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bumblebee.model import Bumblebee
from bumblebee.optim import Schedule
from bumblebee.training.loader import epoch_order
from helpers.training_runs import Rows, small_model

IGNORE_INDEX = -100


def steps_of(samples: int, per_step: int, steps: int, seed: int) -> list[list[int]]:
    """Which samples each step has: epochs in their own orders, cut every ``per_step`` samples."""
    cut: list[list[int]] = []
    epoch = 0
    while len(cut) < steps:
        order = epoch_order(samples, seed, epoch).tolist()
        cut += [order[at : at + per_step] for at in range(0, samples, per_step)]
        epoch += 1
    return cut[:steps]


def loss_sum(model: Bumblebee, inputs: Tensor, labels: Tensor) -> Tensor:
    """From the logits of all positions, in one batch."""
    logits = model(inputs, torch.arange(inputs.shape[1]).expand_as(inputs))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def plain_adamw(
    rows: Rows,
    per_step: int,
    steps: int,
    schedule: Schedule,
    clip: float,
    lr: float = 1e-2,
    weight_decay: float = 0.1,
    seed: int = 42,
    dtype: torch.dtype = torch.float32,
    **model_changes: object,
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Train; returns {"loss", "grad_norm"} of each step that had a target, and the weights."""
    rows.setup(0)
    model = small_model(**model_changes).to(dtype)
    parameters = dict(model.named_parameters())
    kept = [p for name, p in parameters.items() if p.ndim == 1 or "embed" in name]
    decayed = [p for name, p in parameters.items() if p.ndim == 2 and "embed" not in name]
    groups = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
    lines = []
    for step, chosen in enumerate(steps_of(len(rows.train), per_step, steps, seed)):
        inputs, labels = (torch.stack(part) for part in zip(*(rows.train[index] for index in chosen), strict=True))
        targets = int((labels != IGNORE_INDEX).sum())
        if targets == 0:
            continue
        loss = loss_sum(model, inputs, labels) / targets
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule.factor(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        lines.append({"loss": loss.item(), "grad_norm": float(norm)})
    return lines, {name: tensor.detach() for name, tensor in parameters.items()}


def plain_gradient(rows: Rows, **model_changes: object) -> dict[str, Tensor]:
    """Of the mean loss over all targets of all rows."""
    rows.setup(0)
    model = small_model(**model_changes)
    inputs, labels = (torch.stack(part) for part in zip(*rows.train, strict=True))
    (loss_sum(model, inputs, labels) / (labels != IGNORE_INDEX).sum()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
