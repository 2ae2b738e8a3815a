"""Scaling laws: the loss as a function of model size N and training tokens D, fitted to a few training runs.

    L(N, D) = E + A / N^alpha + B / D^beta            (Hoffmann et al., arXiv 2203.15556, section 3.3)
    L(N)    = E + A / N^alpha                         where D / N is the same everywhere, which leaves one exponent to be found

For given exponents the coefficients follow by least squares, with none below 0; the exponents are searched on a grid that
shrinks around the best point. Residuals are relative to the loss. Standard errors are those of the jackknife: the spread of the
predictions of fits without one of the runs each. They contain what the runs disagree on, not what a law of this form misses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

_EXPONENTS = (0.01, 2.0)  # searched range
SAME_RATIO = 0.1  # largest relative difference of D / N that counts as none: runs have whole steps


@dataclass(frozen=True)
class TrainedSize:
    """A run of a size ladder.

    Args:
        parameters: N.
        tokens: D.
        loss: after training.
    """

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class ScalingLaw:
    """Coefficients and exponents of a law; see the module. ``b`` is 0 for a law in N alone."""

    e: float
    a: float
    alpha: float
    b: float = 0.0
    beta: float = 0.0

    def loss(self, parameters: float, tokens: float) -> float:
        """The loss at a size."""
        return self.e + self.a * parameters**-self.alpha + (self.b * tokens**-self.beta if self.b else 0.0)

    def formula(self) -> str:
        """The law as text."""
        terms = [f"{self.e:.4g}"] * (self.e > 0) + [f"{self.a:.4g} / N^{self.alpha:.4g}"]
        return " + ".join(terms + [f"{self.b:.4g} / D^{self.beta:.4g}"] * (self.b > 0))


def is_one_ratio(runs: Sequence[TrainedSize]) -> bool:
    """Whether all runs have the same number of tokens per parameter."""
    ratios = [run.tokens / run.parameters for run in runs]
    return max(ratios) <= min(ratios) * (1 + SAME_RATIO)


def fit(runs: Sequence[TrainedSize], constant: bool = True) -> ScalingLaw:
    """Fit a law.

    Args:
        runs: at least three with one ratio of tokens to parameters (two without a constant), or six with several.
        constant: whether the law has the constant E.
    """
    sizes, tokens = (np.array([getattr(run, name) for run in runs]) for name in ("parameters", "tokens"))
    losses = np.array([run.loss for run in runs])
    bases = [sizes] if is_one_ratio(runs) else [sizes, tokens]

    def solve(exponents: Sequence[float]) -> tuple[float, list[float]]:
        columns = [np.ones_like(sizes)] * constant + [
            (base / base[0]) ** -power for base, power in zip(bases, exponents, strict=True)
        ]
        return _nonnegative_least_squares(np.stack(columns, axis=1) / losses[:, None], np.ones_like(losses))

    exponents = _search(lambda tried: solve(tried)[0], len(bases))
    coefficients = solve(exponents)[1]
    e, *scaled = coefficients if constant else [0.0, *coefficients]
    terms = [(value * base[0] ** power, power) for value, base, power in zip(scaled, bases, exponents, strict=True)]
    return ScalingLaw(e, *(float(each) for term in terms for each in term))


def standard_error(runs: Sequence[TrainedSize], parameters: float, tokens: float) -> float:
    """The jackknife's standard error of a predicted loss. With three runs, fits to two of them have no constant."""
    fewest = 3 if is_one_ratio(runs) else 6
    fits = [fit([*runs[:left_out], *runs[left_out + 1 :]], len(runs) > fewest) for left_out in range(len(runs))]
    losses = [law.loss(parameters, tokens) for law in fits]
    mean = sum(losses) / len(losses)
    return math.sqrt((len(losses) - 1) / len(losses) * sum((loss - mean) ** 2 for loss in losses))


def _nonnegative_least_squares(columns: np.ndarray, target: np.ndarray) -> tuple[float, list[float]]:
    """Return the squared error and the coefficients, by trying which of the few columns are used."""
    best = float("inf"), [0.0] * columns.shape[1]
    for used in (chosen for count in range(1, columns.shape[1] + 1) for chosen in combinations(range(columns.shape[1]), count)):
        part = columns[:, used]
        values = np.linalg.lstsq(part, target, rcond=None)[0]
        error = float(((part @ values - target) ** 2).sum())
        if values.min() >= 0 and error < best[0]:
            coefficients = [0.0] * columns.shape[1]
            for index, value in zip(used, values, strict=True):
                coefficients[index] = float(value)
            best = error, coefficients
    return best


def _search(error: Callable[[Sequence[float]], float], dimensions: int) -> tuple[float, ...]:
    """The exponents of the smallest error: the best of a grid, then of ever smaller grids around it."""
    low, high = _EXPONENTS
    width = (high - low) / 2
    best = min(product(np.linspace(low, high, 40), repeat=dimensions), key=error)
    while width > 1e-9:
        steps = [np.clip(np.linspace(at - width / 10, at + width / 10, 5), low, high) for at in best]
        best = min([best, *product(*steps)], key=error)
        width *= 0.6
    return tuple(float(power) for power in best)
