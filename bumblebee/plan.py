"""Plan: which samples each optimizer step of each rank uses, and how many steps there are. Plain arithmetic.

An epoch is cut into steps of ``micro_batch_size * accumulate * world_size`` samples; its last step takes what is left, so that
nothing is dropped or carried over. A step's samples depend on the order of the epoch and the step's number only: how they are
spread over micro-batches and ranks does not change what is learned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """One micro-batch: samples ``first`` to ``last`` (exclusive) of an epoch's order; empty where a rank has run out."""

    epoch: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run.

    Args:
        samples: samples in an epoch.
        micro_batch_size: samples in a micro-batch.
        accumulate: micro-batches of one rank in a step.
        world_size: ranks.
        max_steps: optimizer steps in the whole run.
    """

    samples: int
    micro_batch_size: int
    accumulate: int
    world_size: int
    max_steps: int

    @classmethod
    def of(
        cls, samples: int, micro_batch_size: int, accumulate: int, world_size: int, epochs: float, max_steps: int | None
    ) -> Plan:
        """A plan for ``max_steps`` steps, or for ``epochs`` (fractions count) where that is None.

        Raises:
            ValueError: there is nothing to train on.
        """
        if samples < 1:
            raise ValueError("there is nothing to train on: the data has no training samples")
        plan = cls(samples, micro_batch_size, accumulate, world_size, max_steps or 0)
        if max_steps is not None:
            return plan
        whole = int(epochs)
        steps = whole * plan.steps_per_epoch + math.ceil((epochs - whole) * plan.steps_per_epoch)
        return cls(samples, micro_batch_size, accumulate, world_size, steps)

    @property
    def samples_per_step(self) -> int:
        """Samples of a full step, over all ranks."""
        return self.micro_batch_size * self.accumulate * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, the last of which may be smaller."""
        return math.ceil(self.samples / self.samples_per_step)

    def epoch(self, step: int) -> float:
        """How many epochs are done after ``step`` steps."""
        whole, rest = divmod(step, self.steps_per_epoch)
        return whole + min(1.0, rest * self.samples_per_step / self.samples)

    def window(self, step: int, rank: int) -> list[Place]:
        """The micro-batches of a rank in a step, equally many on every rank."""
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self.samples_per_step
        last = min(first + self.samples_per_step, self.samples)
        across = self.micro_batch_size * self.world_size
        places = []
        for turn in range(math.ceil((last - first) / across)):
            begin = min(first + turn * across + rank * self.micro_batch_size, last)
            places.append(Place(epoch, begin, min(begin + self.micro_batch_size, last)))
        return places
