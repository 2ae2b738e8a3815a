"""Plan: which samples each rank uses in each optimizer step, and how many steps there are. Plain arithmetic.

An epoch is split into steps of ``micro_batch_size * accumulate * world_size`` samples; its last step takes the remainder, so
that no sample is dropped or carried over. The samples of a step depend only on the order of the epoch and on the step; how they
are distributed over micro-batches and ranks does not change the result.

A task may prepare the samples of several consecutive steps of an epoch together, and train on them several times, as
reinforcement learning does with its rollouts. With ``steps_per_rollout`` n and ``rollout_epochs`` m, a rollout batch holds the
samples of n steps, of fewer at the end of an epoch, and is trained on in m times as many optimizer steps: all its steps in
order, m times over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class SampleRange:
    """A micro-batch: samples ``first`` to ``last`` (exclusive) of an epoch's order; empty if none are left for a rank."""

    epoch: int
    first: int
    last: int


@dataclass(frozen=True)
class Position:
    """Progress of a run: ``step`` steps are done, and the first ``sample`` samples of epoch ``epoch`` have been used.

    ``into`` of those steps belong to a rollout batch that begins at ``sample`` and is not finished.
    """

    step: int = 0
    epoch: int = 0
    sample: int = 0
    into: int = 0


@dataclass(frozen=True)
class RolloutSteps:
    """The optimizer steps that train on one rollout batch.

    Args:
        first: the first one, counted from 0.
        size: steps whose samples the rollout batch holds.
        count: steps that train on it.
    """

    first: int
    size: int
    count: int


@dataclass(frozen=True)
class Plan:
    """Which samples each step of a run uses.

    Args:
        samples: samples per epoch.
        micro_batch_size: samples per micro-batch.
        accumulate: micro-batches per step on each rank.
        world_size: number of ranks.
        max_steps: optimizer steps of the whole run.
        origin: where this plan starts; earlier steps may have had another number of samples.
        steps_per_rollout: steps whose samples are prepared together.
        rollout_epochs: times that each rollout batch is trained on.
    """

    samples: int
    micro_batch_size: int
    accumulate: int
    world_size: int
    max_steps: int
    origin: Position = Position()
    steps_per_rollout: int = 1
    rollout_epochs: int = 1

    @classmethod
    def of(
        cls,
        samples: int,
        micro_batch_size: int,
        accumulate: int,
        world_size: int,
        epochs: float,
        max_steps: int | None,
        origin: Position = Position(),  # noqa: B008  (frozen)
        steps_per_rollout: int = 1,
        rollout_epochs: int = 1,
    ) -> Plan:
        """Plan ``max_steps`` steps, or ``epochs`` (may be fractional) if that is None.

        Raises:
            ValueError: there are no training samples.
        """
        if samples < 1:
            raise ValueError("there is nothing to train on: the data has no training samples")
        sizes = samples, micro_batch_size, accumulate, world_size
        plan = cls(*sizes, max_steps or 0, origin, steps_per_rollout, rollout_epochs)
        return plan if max_steps is not None else replace(plan, max_steps=plan.steps_for(epochs))

    def steps_for(self, epochs: float) -> int:
        """Number of steps after which so many epochs are done."""
        whole = int(epochs)
        fraction = math.ceil((epochs - whole) * self.windows_per_epoch)
        if self.origin.epoch < whole:
            rest = (whole - self.origin.epoch - 1) * self.steps_per_epoch + fraction * self.rollout_epochs
            return self.origin.step + self._steps_left + rest
        if self.origin.epoch > whole:
            return self.origin.step
        left = min(fraction * self.samples_per_step, self.samples) - self.origin.sample
        steps = math.ceil(left / self.samples_per_step) * self.rollout_epochs - self.origin.into
        return self.origin.step + max(0, steps)

    @property
    def samples_per_step(self) -> int:
        """Samples per full step, over all ranks."""
        return self.micro_batch_size * self.accumulate * self.world_size

    @property
    def windows_per_epoch(self) -> int:
        """Number of windows, the samples of a step, that an epoch is split into; the last may have fewer samples."""
        return math.ceil(self.samples / self.samples_per_step)

    @property
    def micro_batches_per_step(self) -> float:
        """Micro-batches per step and rank, on average: the last step of an epoch may have fewer."""
        return -(-self.samples // (self.micro_batch_size * self.world_size)) / self.windows_per_epoch

    @property
    def micro_batches_per_rollout(self) -> int:
        """Micro-batches of a rank whose samples are prepared together."""
        return math.ceil(self.micro_batches_per_step) * self.steps_per_rollout

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return self.windows_per_epoch * self.rollout_epochs

    @property
    def _windows_left(self) -> int:
        """Windows of the origin's epoch that are not used up."""
        return math.ceil((self.samples - self.origin.sample) / self.samples_per_step)

    @property
    def _steps_left(self) -> int:
        """Remaining steps of the origin's epoch."""
        return self._windows_left * self.rollout_epochs - self.origin.into

    def _locate(self, step: int) -> tuple[int, int, int, int]:
        """The epoch of a step, that epoch's first sample in this plan, its windows, and the steps of it that are done."""
        since = step - self.origin.step
        if since < self._steps_left:
            return self.origin.epoch, self.origin.sample, self._windows_left, since + self.origin.into
        epochs, done = divmod(since - self._steps_left, self.steps_per_epoch)
        return self.origin.epoch + 1 + epochs, 0, self.windows_per_epoch, done

    def rollout(self, step: int) -> RolloutSteps:
        """The steps of the rollout batch that a step belongs to."""
        _, _, windows, done = self._locate(step)
        first, into = divmod(done, self.steps_per_rollout * self.rollout_epochs)
        size = min(self.steps_per_rollout, windows - first * self.steps_per_rollout)
        return RolloutSteps(step - into, size, size * self.rollout_epochs)

    def position(self, step: int) -> Position:
        """The position after ``step`` steps; the end of an epoch is the start of the next."""
        epoch, begin, _, done = self._locate(step)
        rollouts, into = divmod(done, self.steps_per_rollout * self.rollout_epochs)
        return Position(step, epoch, begin + rollouts * self.steps_per_rollout * self.samples_per_step, into)

    def epoch(self, step: int) -> float:
        """Epochs done after ``step`` steps, as a fraction."""
        epoch, begin, _, done = self._locate(step)
        return epoch + min(begin + done * self.samples_per_step / self.rollout_epochs, self.samples) / self.samples

    def window(self, step: int, rank: int) -> list[SampleRange]:
        """The micro-batches of a rank in a step; every rank has the same number."""
        position, size = self.position(step), self.rollout(step).size
        first = position.sample + position.into % size * self.samples_per_step
        last = min(first + self.samples_per_step, self.samples)
        across = self.micro_batch_size * self.world_size
        micro_batches = []
        for index in range(math.ceil((last - first) / across)):
            begin = min(first + index * across + rank * self.micro_batch_size, last)
            micro_batches.append(SampleRange(position.epoch, begin, min(begin + self.micro_batch_size, last)))
        return micro_batches

    def rollout_window(self, step: int, rank: int) -> list[list[SampleRange]]:
        """The micro-batches of a rank in each step whose samples the rollout batch of a step holds."""
        rollout = self.rollout(step)
        return [self.window(rollout.first + index, rank) for index in range(rollout.size)]
