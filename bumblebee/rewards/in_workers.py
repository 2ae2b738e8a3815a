"""InWorkers: a reward that is computed in worker processes, with a time-out for each completion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from bumblebee.rewards.reward import (
    CompletionError,
    Failure,
    InputReward,
    OnFailure,
    RewardInput,
    check_signature,
    name_of,
)
from bumblebee.rewards.worker_main import Reply
from bumblebee.rewards.worker_processes import WorkerProcesses, pickled


class InWorkers(InputReward):
    """Computes a reward in worker processes, one completion at a time.

    A worker is a new Python process, which imports the reward's module. Each rank has its own workers. One that takes too long
    for a completion is killed with all its child processes, and replaced.

    Args:
        reward: by class path or function path. A class is built in the training process and pickled.
        processes: number of workers.
        timeout: seconds for one completion.
        on_timeout: reward of a completion that takes longer, or "stop" to end the run.
        on_error: reward of a completion for which the reward raises or its process dies, or "stop" to end the run.

    Raises:
        ValueError: a number out of range, or the reward cannot be sent to another process.
    """

    can_fail = waits = True

    def __init__(
        self,
        reward: Callable[[list[str], list[str], list[Mapping[str, object]]], Sequence[float]],
        processes: int = 4,
        timeout: float = 10.0,
        on_timeout: OnFailure = 0.0,
        on_error: OnFailure = "stop",
    ) -> None:
        if processes < 1:
            raise ValueError(f"processes must be at least 1, got {processes}")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be positive, got {timeout}")
        check_on_failure("on_timeout", on_timeout)
        check_on_failure("on_error", on_error)
        self.__name__ = name_of(reward)
        self.reward, self.processes, self.timeout = reward, processes, timeout
        self.on_timeout, self.on_error = on_timeout, on_error
        self._workers = WorkerProcesses(pickled(reward, reward, f"reward: {name_of(reward)}"), processes, timeout)

    def check(self) -> None:
        """Check the reward, in this process."""
        if isinstance(self.reward, InputReward):
            self.reward.check()
        else:
            check_signature(self.reward)

    def score(self, inputs: Sequence[RewardInput]) -> list[float | Failure]:
        """See the class.

        Raises:
            CompletionError: a completion failed, and the option for that is "stop"; or its value is not a finite number.
            RewardError: a worker cannot start.
        """
        values: list[float | Failure] = [0.0] * len(inputs)
        for index, reply in self._workers.replies(inputs):
            values[index] = self._value(index, reply)
        return values

    def _value(self, index: int, reply: Reply) -> float | Failure:
        if isinstance(reply.value, float | Failure):
            return reply.value
        if reply.invalid:
            raise CompletionError(index, reply.what, reply.detail)
        value = self.on_timeout if reply.timed_out else self.on_error
        if value == "stop":
            raise CompletionError(index, reply.what, reply.detail)
        return Failure(float(value), reply.what, reply.detail, reply.timed_out)


def check_on_failure(option: str, value: OnFailure) -> None:
    """Check the value of an option such as ``on_timeout``.

    Raises:
        ValueError: it is not finite.
    """
    if value != "stop" and not math.isfinite(value):
        raise ValueError(f'{option} must be a finite number or "stop", got {value}')
