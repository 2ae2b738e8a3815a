"""WeightedRewards: scores completions by several reward functions, and reports what is wrong with a function."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bumblebee.distributed import process_group
from bumblebee.rewards.reward import (
    CompletionError,
    Failure,
    InputReward,
    RewardError,
    RewardFunction,
    RewardInput,
    check_signature,
    describe,
    name_of,
    score_all,
)  # fmt: skip
from bumblebee.rewards.reward_model import RewardModel
from bumblebee.rl.reward_failures import RewardFailures
from bumblebee.rl.rollout import Question, Rollout


class WeightedRewards:
    """A weighted sum of reward functions.

    Args:
        functions: see ``bumblebee/rewards/``.
        weights: of the functions; None weights all 1.

    Attributes:
        names: of the functions, with a number where a name occurs several times.
        failures: completions of this rank that could not be scored, in a run that goes on.
        can_fail: whether there may be failures.

    Raises:
        ValueError: there are no functions, or another number of weights.
    """

    def __init__(self, functions: Sequence[RewardFunction], weights: Sequence[float] | None) -> None:
        self.functions = list(functions)
        self.weights = [1.0] * len(functions) if weights is None else list(weights)
        if not functions:
            raise ValueError("task.rewards must name at least one reward function, such as bumblebee.rewards.ExactAnswer")
        if len(self.weights) != len(functions):
            raise ValueError(f"reward_weights has {len(self.weights)} numbers for {len(functions)} rewards")
        self.names = _unique([name_of(function) for function in functions])
        self.failures = RewardFailures()
        self.can_fail = any(isinstance(function, InputReward) and function.can_fail for function in functions)

    def __str__(self) -> str:
        pairs = zip(self.names, self.weights, strict=True)
        return ", ".join(name if weight == 1 else f"{weight:g} x {name}" for name, weight in pairs)

    def check(self) -> None:
        """Check before training what the functions depend on, such as a server.

        Raises:
            ValueError: it cannot be used.
        """
        for name, function in zip(self.names, self.functions, strict=True):
            try:
                if isinstance(function, InputReward):
                    function.check()
                else:
                    check_signature(function)
            except ValueError as error:
                raise ValueError(f"task.rewards: {name}: {error}") from error

    def folders(self) -> dict[str, Path]:
        """Model folders of the functions, by role."""
        pairs = zip(self.names, self.functions, strict=True)
        return {f"{name}'s": Path(function.folder) for name, function in pairs if isinstance(function, RewardModel)}

    def begin(self, device: torch.device) -> None:
        """Load the functions' models onto this rank's device."""
        for function in self.functions:
            if isinstance(function, InputReward):
                function.begin(device)

    def score(self, rollouts: Sequence[Rollout], questions: Sequence[Question]) -> None:
        """Set ``rewards`` and ``reward`` of each rollout. Collective: if a function fails on one rank, all ranks stop.

        Args:
            rollouts: of this rank.
            questions: that each of them answers.

        Raises:
            RewardError: a function raised, or returned another number of rewards, or what is not a finite number.
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
        scored = self._all_values(rollouts, questions)
        columns = [self._counted(name, values, questions) for name, values in zip(self.names, scored, strict=True)]
        for rollout, rewards in zip(rollouts, zip(*columns, strict=True), strict=True):
            rollout.rewards = list(rewards)
            rollout.reward = sum(weight * reward for weight, reward in zip(self.weights, rewards, strict=True))

    def _all_values(self, rollouts: Sequence[Rollout], questions: Sequence[Question]) -> list[list[float | Failure]]:
        """Values of each function. Those that wait for other processes do so at the same time, while the others run here."""
        pairs = list(zip(self.names, self.functions, strict=True))
        waiting = [pair for pair in pairs if isinstance(pair[1], InputReward) and pair[1].waits] if len(pairs) > 1 else []
        if not waiting:
            return [self._values(*pair, rollouts, questions) for pair in pairs]
        with ThreadPoolExecutor(len(waiting)) as threads:
            pending = {name: threads.submit(self._values, name, each, rollouts, questions) for name, each in waiting}
            here = {name: self._values(name, each, rollouts, questions) for name, each in pairs if name not in pending}
            return [here[name] if name in here else pending[name].result() for name in self.names]

    def _values(
        self, name: str, function: RewardFunction, rollouts: Sequence[Rollout], questions: Sequence[Question]
    ) -> list[float | Failure]:
        inputs = [
            RewardInput(
                question.question, rollout.text, question.record, len(rollout.tokens), question.messages, question.tools
            )
            for rollout, question in zip(rollouts, questions, strict=True)
        ]
        places = [question.place for question in questions]
        try:
            return score_all(function, inputs)
        except CompletionError as error:
            detail = f": {error.detail}" if error.detail else ""
            raise RewardError(f"task.rewards: {name} {error.what} a completion of {places[error.index]}{detail}") from error
        except RewardError as error:
            raise RewardError(f"task.rewards: {name} {error}") from error
        except Exception as error:
            affected = _shortened(list(dict.fromkeys(places)))
            raise RewardError(f"task.rewards: {name} failed on completions of {affected}: {describe(error)}") from error

    def _counted(self, name: str, values: Sequence[float | Failure], questions: Sequence[Question]) -> list[float]:
        """Count a function's failures, and return the values that they have."""
        places = [question.place for question in questions]
        failures = [(place, value) for place, value in zip(places, values, strict=True) if isinstance(value, Failure)]
        self.failures.add(name, failures)
        return [value.value if isinstance(value, Failure) else value for value in values]


def _shortened(places: Sequence[str]) -> str:
    """The first three places, and how many more there are."""
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return ", ".join(places[:3]) + more


def _unique(names: Sequence[str]) -> list[str]:
    """Names with a number where one occurs several times."""
    return [name if names.count(name) == 1 else f"{name}_{names[:at].count(name) + 1}" for at, name in enumerate(names)]
