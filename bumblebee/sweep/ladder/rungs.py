"""Ladder: the same recipe at growing sizes with the number of tokens per parameter fixed.

    ladder:
      tokens_per_parameter: 20                    # or several: [10, 20, 40]
      sizes:                                      # the options that make the model of each size
        - {task.model.config.hidden_size: 64, task.model.config.num_hidden_layers: 2}
        - ...
      predict: [{...}]                            # sizes whose loss is predicted, not trained

N is the number of parameters that take part in matrix products: all but an embedding table that is only looked up, and of
routed experts the active ones. Training then costs about 6 N D FLOPs (and attention).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from bumblebee.sweep.errors import SweepError
from bumblebee.sweep.parameter import OPTIONS, Parameter, Value
from bumblebee.sweep.sweep_file import LadderEntry, SweepFile

STEPS = "trainer.max_steps"


@dataclass(frozen=True)
class Rung:
    """A size of the ladder with its number of tokens.

    Args:
        options: that make the model.
        parameters: N.
        tokens: D, rounded up to whole steps.
        steps: of training.
    """

    options: Mapping[str, Value]
    parameters: float
    tokens: float
    steps: int

    def value(self) -> dict[str, object]:
        """The options of a trial."""
        return {**self.options, STEPS: self.steps}


@dataclass(frozen=True)
class Ladder:
    """The rungs that are trained, and those that are predicted."""

    trained: Sequence[Rung]
    predicted: Sequence[Rung]

    def rung(self, values: Mapping[str, Value]) -> Rung | None:
        """The rung of a trial's values."""
        return next((rung for rung in self.trained if rung.value() == values.get(OPTIONS)), None)


def resolve(
    file: SweepFile, entry: LadderEntry, measure: Callable[[Mapping[str, Value]], tuple[float, float]]
) -> tuple[SweepFile, Ladder]:
    """Turn a ladder into a grid over its rungs.

    Args:
        file: with the ladder.
        entry: the ladder in it.
        measure: returns the number of parameters and of tokens per step of a recipe with some options.

    Raises:
        SweepError: two sizes have the same number of parameters.
    """

    def rungs(sizes: Sequence[Mapping[str, Value]], ratios: Sequence[float]) -> list[Rung]:
        made = []
        for options in sizes:
            parameters, per_step = measure(options)
            for ratio in ratios:
                steps = math.ceil(ratio * parameters / per_step)
                made.append(Rung(options, parameters, steps * per_step, steps))
        return sorted(made, key=lambda rung: (rung.parameters, rung.tokens))

    trained = rungs(entry.sizes, entry.tokens_per_parameter)
    sizes = {rung.parameters for rung in trained}
    if len(sizes) < len(entry.sizes):
        raise SweepError(f"{file.at('ladder.sizes')}: two sizes have the same number of parameters: {sorted(sizes)}")
    predicted = rungs(entry.predict, entry.tokens_per_parameter)
    choices = tuple(rung.value() for rung in trained)
    grid = Parameter(OPTIONS, "categorical", "choice", choices=choices)
    return replace(file, parameters=[grid], method="grid"), Ladder(trained, predicted or [_next(trained)])


def _next(trained: Sequence[Rung]) -> Rung:
    """The size that follows with the factor between the last two, at the largest number of tokens per parameter."""
    last = trained[-1]
    smaller = max(rung.parameters for rung in trained if rung.parameters < last.parameters)
    factor = last.parameters / smaller
    return Rung({}, last.parameters * factor, last.tokens * factor, round(last.steps * factor))
