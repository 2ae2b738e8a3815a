"""Plan: which samples each optimizer step of each rank uses, and how many steps there are. Plain arithmetic.

An epoch is cut into steps of ``micro_batch_size * accumulate * world_size`` samples; its last step takes what is left, so that
nothing is dropped or carried over. A step's samples depend on the order of the epoch and the step's number only: how they are
spread over micro-batches and ranks does not change what is learned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Place:
    """One micro-batch: samples ``first`` to ``last`` (exclusive) of an epoch's order; empty where a rank has run out."""

    epoch: int
    first: int
    last: int


@dataclass(frozen=True)
class Position:
    """How far a run has come: ``step`` steps are done, and the first ``sample`` samples of epoch ``epoch`` have been used."""

    step: int = 0
    epoch: int = 0
    sample: int = 0


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run.

    Args:
        samples: samples in an epoch.
        micro_batch_size: samples in a micro-batch.
        accumulate: micro-batches of one rank in a step.
        world_size: ranks.
        max_steps: optimizer steps in the whole run.
        origin: where this plan begins; the steps before were another's, perhaps with more or fewer samples in each.
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
        """A plan for ``max_steps`` steps, or for ``epochs`` (fractions count) where that is None.

        Raises:
            ValueError: there is nothing to train on.
        """
        if samples < 1:
            raise ValueError("there is nothing to train on: the data has no training samples")
        plan = cls(samples, micro_batch_size, accumulate, world_size, max_steps or 0, origin)
        return plan if max_steps is not None else replace(plan, max_steps=plan.steps_for(epochs))

    def steps_for(self, epochs: float) -> int:
        """The number of steps after which so many epochs are done."""
        whole = int(epochs)
        part = math.ceil((epochs - whole) * self.steps_per_epoch)
        if self.origin.epoch < whole:
            return self.origin.step + self._steps_left + (whole - self.origin.epoch - 1) * self.steps_per_epoch + part
        if self.origin.epoch > whole:
            return self.origin.step
        left = min(part * self.samples_per_step, self.samples) - self.origin.sample
        return self.origin.step + max(0, math.ceil(left / self.samples_per_step))

    @property
    def samples_per_step(self) -> int:
        """Samples of a full step, over all ranks."""
        return self.micro_batch_size * self.accumulate * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, the last of which may be smaller."""
        return math.ceil(self.samples / self.samples_per_step)

    @property
    def _steps_left(self) -> int:
        """Steps that the origin's epoch still takes."""
        return math.ceil((self.samples - self.origin.sample) / self.samples_per_step)

    def position(self, step: int) -> Position:
        """Where the run is after ``step`` steps; an epoch that is done is the next one's beginning."""
        since = step - self.origin.step
        if since < self._steps_left:
            return Position(step, self.origin.epoch, self.origin.sample + since * self.samples_per_step)
        epochs, index = divmod(since - self._steps_left, self.steps_per_epoch)
        return Position(step, self.origin.epoch + 1 + epochs, index * self.samples_per_step)

    def epoch(self, step: int) -> float:
        """How many epochs are done after ``step`` steps."""
        position = self.position(step)
        return position.epoch + position.sample / self.samples

    def window(self, step: int, rank: int) -> list[Place]:
        """The micro-batches of a rank in a step, equally many on every rank."""
        position = self.position(step)
        last = min(position.sample + self.samples_per_step, self.samples)
        across = self.micro_batch_size * self.world_size
        places = []
        for turn in range(math.ceil((last - position.sample) / across)):
            begin = min(position.sample + turn * across + rank * self.micro_batch_size, last)
            places.append(Place(position.epoch, begin, min(begin + self.micro_batch_size, last)))
        return places
