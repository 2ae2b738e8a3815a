"""ToolMeter: how often tools are called, and fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bumblebee.distributed import process_group
from bumblebee.rl.rollout import Rollout

_KEY = "tool use"


class ToolMeter:
    """Counts since the last line of metrics, on this rank."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._counts = {"calls": 0, "errors": 0, "turns": 0, "completions": 0}

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Count the turns and calls of completions."""
        roles = [[turn["role"] for turn in rollout.turns] for rollout in rollouts]
        self._counts["calls"] += sum(each.count("tool") for each in roles)
        self._counts["errors"] += sum(rollout.tool_errors for rollout in rollouts)
        self._counts["turns"] += sum(each.count("assistant") for each in roles)
        self._counts["completions"] += len(rollouts)

    def metrics(self) -> dict[str, float]:
        """The metrics since the last call, over all ranks; none without a completion. Collective."""
        calls, errors, turns, completions = process_group.host_sum(list(self._counts.values()))
        self._clear()
        if not completions:
            return {}
        return {"rl/tool_calls": calls / completions, "rl/tool_errors": errors, "rl/turns": turns / completions}

    def state(self) -> dict[str, Tensor]:
        """This rank's counts, for a checkpoint between two lines of metrics; empty after a line."""
        if not self._counts["completions"]:
            return {}
        return {_KEY: torch.tensor(list(self._counts.values()), dtype=torch.float64)}

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Continue from ``state``."""
        if _KEY in sums:
            self._counts = dict(zip(self._counts, map(int, sums[_KEY].tolist()), strict=True))
