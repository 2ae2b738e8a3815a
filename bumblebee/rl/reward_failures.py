"""RewardFailures: counts completions that could not be scored, and warns about them now and then."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bumblebee.distributed import process_group
from bumblebee.rewards.reward import Failure
from bumblebee.utils.formatting import number

logger = logging.getLogger(__name__)


class RewardFailures:
    """Failures of this rank.

    A reward's failures are reported when there are the first ones, and whenever their number has doubled: a reward that always
    fails writes twenty lines, not a million.

    Attributes:
        counts: since the last ``take``, of "timeouts" and "errors".
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._totals: Counter[tuple[str, bool]] = Counter()

    def add(self, name: str, failures: Sequence[tuple[str, Failure]]) -> None:
        """Count the failures of a reward, and warn.

        Args:
            name: of the reward.
            failures: (FILE:LINE of the prompt, failure) of some completions.
        """
        for timed_out in (True, False):
            chosen = [(place, failure) for place, failure in failures if failure.timed_out == timed_out]
            if not chosen:
                continue
            before = self._totals[name, timed_out]
            self._totals[name, timed_out] += len(chosen)
            self.counts["timeouts" if timed_out else "errors"] += len(chosen)
            if before.bit_length() < self._totals[name, timed_out].bit_length():
                self._warn(name, chosen, self._totals[name, timed_out])

    @staticmethod
    def _warn(name: str, failures: Sequence[tuple[str, Failure]], total: int) -> None:
        place, failure = failures[0]
        detail = f": {failure.detail}" if failure.detail else ""
        more = f"; so did {number(total - 1)} more of this run" if total > 1 else ""
        logger.warning(
            "task.rewards: %s %s a completion of %s%s; it counts as %g%s",
            name, failure.what, place, detail, failure.value, more,
        )  # fmt: skip

    def take(self) -> dict[str, float]:
        """Numbers of all ranks since the last call. Collective."""
        timeouts, errors = process_group.host_sum([self.counts["timeouts"], self.counts["errors"]])
        self.counts.clear()
        return {"rl/reward_timeouts": timeouts, "rl/reward_errors": errors}

    def state(self) -> dict[str, Tensor]:
        """This rank's numbers since the last ``take``, for a checkpoint between two lines of metrics."""
        return {"reward_failures": torch.tensor([self.counts["timeouts"], self.counts["errors"]], dtype=torch.float64)}

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Continue from ``state``."""
        if "reward_failures" in sums:
            self.counts["timeouts"], self.counts["errors"] = map(int, sums["reward_failures"].tolist())
