"""Plan: which samples each rank uses in each optimizer step, and how many steps there are. Plain arithmetic.

An epoch is split into steps of ``micro_batch_size * accumulate * world_size`` samples; its last step takes the remainder, so
that no sample is dropped or carried over. The samples of a step depend only on the order of the epoch and on the step; how they
are distributed over micro-batches and ranks does not change the result.
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
    """Progress of a run: ``step`` steps are done, and the first ``sample`` samples of epoch ``epoch`` have been used."""

    step: int = 0
    epoch: int = 0
    sample: int = 0


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
    """

    samples: int
    micro_batch_size: int
    accumulate: int
    world_size: int
    max_steps: int
    origin: Position = Position()

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
    ) -> Plan:
        """Plan ``max_steps`` steps, or ``epochs`` (may be fractional) if that is None.

        Raises:
            ValueError: there are no training samples.
        """
        if samples < 1:
            raise ValueError("there is nothing to train on: the data has no training samples")
        plan = cls(samples, micro_batch_size, accumulate, world_size, max_steps or 0, origin)
        return plan if max_steps is not None else replace(plan, max_steps=plan.steps_for(epochs))

    def steps_for(self, epochs: float) -> int:
        """Number of steps after which so many epochs are done."""
        whole = int(epochs)
        fraction = math.ceil((epochs - whole) * self.steps_per_epoch)
        if self.origin.epoch < whole:
            return self.origin.step + self._steps_left + (whole - self.origin.epoch - 1) * self.steps_per_epoch + fraction
        if self.origin.epoch > whole:
            return self.origin.step
        left = min(fraction * self.samples_per_step, self.samples) - self.origin.sample
        return self.origin.step + max(0, math.ceil(left / self.samples_per_step))

    @property
    def samples_per_step(self) -> int:
        """Samples per full step, over all ranks."""
        return self.micro_batch_size * self.accumulate * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; the last may have fewer samples."""
        return math.ceil(self.samples / self.samples_per_step)

    @property
    def _steps_left(self) -> int:
        """Remaining steps of the origin's epoch."""
        return math.ceil((self.samples - self.origin.sample) / self.samples_per_step)

    def position(self, step: int) -> Position:
        """The position after ``step`` steps; the end of an epoch is the start of the next."""
        since = step - self.origin.step
        if since < self._steps_left:
            return Position(step, self.origin.epoch, self.origin.sample + since * self.samples_per_step)
        epochs, index = divmod(since - self._steps_left, self.steps_per_epoch)
        return Position(step, self.origin.epoch + 1 + epochs, index * self.samples_per_step)

    def epoch(self, step: int) -> float:
        """Epochs done after ``step`` steps, as a fraction."""
        position = self.position(step)
        return position.epoch + position.sample / self.samples

    def window(self, step: int, rank: int) -> list[SampleRange]:
        """The micro-batches of a rank in a step; every rank has the same number."""
        position = self.position(step)
        last = min(position.sample + self.samples_per_step, self.samples)
        across = self.micro_batch_size * self.world_size
        micro_batches = []
        for index in range(math.ceil((last - position.sample) / across)):
            begin = min(position.sample + index * across + rank * self.micro_batch_size, last)
            micro_batches.append(SampleRange(position.epoch, begin, min(begin + self.micro_batch_size, last)))
        return micro_batches
