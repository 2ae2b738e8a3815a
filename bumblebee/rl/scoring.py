"""WeightedRewards: scores completions by several reward functions, and reports what is wrong with a function."""

from __future__ import annotations

import math
import traceback
from collections.abc import Sequence

from bumblebee.distributed import process_group
from bumblebee.rewards import RewardError, RewardFunction
from bumblebee.rl.rollout import Question, Rollout
from bumblebee.utils.formatting import plural


class WeightedRewards:
    """A weighted sum of reward functions.

    Args:
        functions: see ``bumblebee/rewards.py``.
        weights: of the functions; None weights all 1.

    Attributes:
        names: of the functions, with a number where a name occurs several times.

    Raises:
        ValueError: there are no functions, or another number of weights.
    """

    def __init__(self, functions: Sequence[RewardFunction], weights: Sequence[float] | None) -> None:
        self.functions = list(functions)
        self.weights = [1.0] * len(functions) if weights is None else list(weights)
        if not functions:
            raise ValueError("rewards must name at least one reward function, such as bumblebee.rewards.ExactAnswer")
        if len(self.weights) != len(functions):
            raise ValueError(f"reward_weights has {len(self.weights)} numbers for {len(functions)} rewards")
        self.names = _unique([getattr(function, "__name__", type(function).__name__) for function in functions])

    def __str__(self) -> str:
        pairs = zip(self.names, self.weights, strict=True)
        return ", ".join(name if weight == 1 else f"{weight:g} x {name}" for name, weight in pairs)

    def score(self, rollouts: Sequence[Rollout], questions: Sequence[Question]) -> None:
        """Set ``rewards`` and ``reward`` of each rollout. Collective: if a function fails on one rank, all ranks stop.

        Args:
            rollouts: of this rank.
            questions: that each of them answers.

        Raises:
            RewardError: a function raised, or returned another number of rewards, or one that is not finite.
        """
        error: RewardError | None = None
        try:
            self._score(rollouts, questions)
        except RewardError as failure:
            error = failure
        process_group.raise_on_all_ranks(error, "a reward function failed on another rank")

    def _score(self, rollouts: Sequence[Rollout], questions: Sequence[Question]) -> None:
        if not rollouts:
            return
        columns = [self._values(*each, rollouts, questions) for each in zip(self.names, self.functions, strict=True)]
        for rollout, rewards in zip(rollouts, zip(*columns, strict=True), strict=True):
            rollout.rewards = list(rewards)
            rollout.reward = sum(weight * reward for weight, reward in zip(self.weights, rewards, strict=True))

    @staticmethod
    def _values(name: str, function: RewardFunction, rollouts: Sequence[Rollout], questions: Sequence[Question]) -> list[float]:
        texts = [rollout.text for rollout in rollouts]
        try:
            given = function([each.question for each in questions], texts, [each.record for each in questions])
            values = [float(value) for value in given]
        except Exception as error:
            places = _shortened(list(dict.fromkeys(question.place for question in questions)))
            raise RewardError(f"task.rewards: {name} failed on completions of {places}: {_origin(error)}") from error
        if len(values) != len(rollouts):
            count = plural(len(values), "reward")
            raise RewardError(f"task.rewards: {name} returned {count} for {len(rollouts)} completions")
        for value, question in zip(values, questions, strict=True):
            if not math.isfinite(value):
                raise RewardError(f"task.rewards: {name} returned {value} for a completion of {question.place}")
        return values


def _shortened(places: Sequence[str]) -> str:
    """The first three places, and how many more there are."""
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return ", ".join(places[:3]) + more


def _origin(error: Exception) -> str:
    """An error with the file and line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{error!r} ({frame.filename}:{frame.lineno})"


def _unique(names: Sequence[str]) -> list[str]:
    """Names with a number where one occurs several times."""
    return [name if names.count(name) == 1 else f"{name}_{names[:at].count(name) + 1}" for at, name in enumerate(names)]
