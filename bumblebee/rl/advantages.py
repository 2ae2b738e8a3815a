"""Advantages: how much better a completion is than expected, from the rewards of its group.

    group_std       (r - mean of the group) / (std of the group + 1e-4)        GRPO, arXiv 2402.03300
    group_mean      r - mean of the group                                      Dr. GRPO, arXiv 2503.20783
    leave_one_out   r - mean of the group's others                             RLOO, arXiv 2402.14740
    batch_std       (r - mean of the step) / (std of the step + 1e-4)          REINFORCE++, arXiv 2501.03262

The standard deviations divide by n - 1. A step's are those of all completions on all ranks.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bumblebee.distributed import process_group

EPS = 1e-4

AdvantageKind = Literal["group_std", "group_mean", "leave_one_out", "batch_std"]


def advantages_of(rewards: Tensor, kind: AdvantageKind) -> Tensor:
    """Advantage of each completion. Collective for batch_std.

    Args:
        rewards: (groups, group size) float64; no group on a rank without prompts.
        kind: see the formulas of the module.
    """
    if kind == "batch_std":
        mean, std = _moments_of_all_ranks(rewards)
        return (rewards - mean) / (std + EPS)
    if not len(rewards):  # torch would warn of the standard deviation of nothing
        return rewards
    size = rewards.shape[1]
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    if kind == "group_mean":
        return centered
    if kind == "leave_one_out":
        return centered * size / (size - 1)
    return centered / (rewards.std(dim=1, keepdim=True) + EPS)


def _moments_of_all_ranks(rewards: Tensor) -> tuple[float, float]:
    count, total = process_group.host_sum([float(rewards.numel()), float(rewards.sum())])
    mean = total / max(count, 1.0)
    (squares,) = process_group.host_sum([float(((rewards - mean) ** 2).sum())])
    return mean, float(torch.tensor(squares / max(count - 1, 1.0)).double().sqrt())
