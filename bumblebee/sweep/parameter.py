"""Parameter: an option of the recipe with the values that it may take.

The distributions are those of W&B sweep files. A sampler draws a choice, an integer or a float in a range, and ``value`` turns
the draw into the option's value: it rounds to a multiple of ``q``, or maps a uniform draw to a normal distribution's quantile.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import NormalDist
from typing import Literal

from bumblebee.utils.formatting import hint

Value = bool | int | float | str | list[object] | dict[str, object] | None
Draw = bool | int | float | str | None  # what a storage can hold

_NUMBERS = {"min", "max", "q", "mu", "sigma"}
_KEYS = {"distribution", "value", "values", "probabilities"} | _NUMBERS
_LOG = {"log_uniform", "log_uniform_values", "inv_log_uniform", "inv_log_uniform_values"}
_RANGES = {"int_uniform", "uniform", "q_uniform", "q_log_uniform", "q_log_uniform_values"} | _LOG
_NORMAL = {"normal", "q_normal", "log_normal", "q_log_normal"}
DISTRIBUTIONS = sorted({"constant", "categorical", "categorical_w_probabilities"} | _RANGES | _NORMAL)
_TAIL = 1e-6  # of a normal distribution, cut off on either side
MAX_GRID = 10_000
OPTIONS = "options"  # the parameter whose values are mappings from options to values, which change together


@dataclass(frozen=True)
class Parameter:
    """One parameter of a sweep; ``read`` makes it from its entry in the file.

    Args:
        key: the option as written in a recipe, without ``init_args``.
        distribution: name, see ``DISTRIBUTIONS``.
        kind: what a sampler draws.
        low: smallest draw of a range.
        high: largest draw of a range.
        log: whether draws are uniform in their logarithm.
        choices: the values of a categorical distribution.
        q: values are multiples of it; None for no rounding.
        normal: mean and standard deviation, of the logarithm for a log-normal distribution.
        cumulative: sums of the probabilities of the choices.
    """

    key: str
    distribution: str
    kind: Literal["choice", "int", "float"]
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: tuple[Value, ...] = ()
    q: float | None = None
    normal: tuple[float, float] = (0.0, 1.0)
    cumulative: tuple[float, ...] = field(default=())

    @classmethod
    def read(cls, key: str, entry: object) -> Parameter:
        """Read an entry such as ``{distribution: uniform, min: 0, max: 1}``.

        Raises:
            ValueError: the message begins with the name of the field that cannot be used.
        """
        if not isinstance(entry, Mapping):
            raise ValueError(f"expected value, values, or min and max, got {entry!r}")
        if unknown := [str(name) for name in entry if name not in _KEYS]:
            raise ValueError(f"unknown key {unknown[0]!r}{hint(unknown[0], _KEYS)}; available keys: {', '.join(sorted(_KEYS))}")
        numbers = {name: _number(name, entry[name]) for name in _NUMBERS if name in entry}
        distribution = str(entry["distribution"]) if "distribution" in entry else _implied(entry, numbers)
        if distribution not in DISTRIBUTIONS:
            available = f"{hint(distribution, DISTRIBUTIONS)}; available distributions: {', '.join(DISTRIBUTIONS)}"
            raise ValueError(f"distribution: unknown distribution {distribution!r}{available}")
        q = _quantum(distribution, numbers)
        if distribution in _NORMAL:
            return _normal(key, distribution, numbers, q)
        if distribution in _RANGES:
            return _range(key, distribution, numbers, q)
        return _choice(key, distribution, entry)

    def value(self, draw: Draw) -> Value:
        """The option's value for a draw."""
        if self.cumulative:
            assert isinstance(draw, int | float)
            return next(
                (choice for choice, total in zip(self.choices, self.cumulative, strict=True) if draw < total), self.choices[-1]
            )
        if self.kind == "choice":
            return self.choices[self.draws().index(draw)]
        assert isinstance(draw, int | float)
        if self.distribution in _NORMAL:
            draw = NormalDist(*self.normal).inv_cdf(draw)
            draw = math.exp(draw) if "log" in self.distribution else draw
        return draw if self.q is None else _multiple(draw, self.q)

    def draws(self) -> list[Draw]:
        """What stands for each choice in a storage: scalars themselves, lists and mappings as JSON."""
        return [json.dumps(choice, sort_keys=True) if isinstance(choice, list | dict) else choice for choice in self.choices]

    def grid(self) -> list[Draw]:
        """All draws, for a grid.

        Raises:
            ValueError: there are infinitely or too many.
        """
        if self.kind == "choice" and not self.cumulative:
            return self.draws()
        step = 1.0 if self.kind == "int" else self.q
        if step is None or self.log or self.distribution not in _RANGES:
            raise ValueError(f"a grid needs values, or min and max with q; {self.distribution} is continuous")
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        if count > MAX_GRID:
            raise ValueError(f"a grid of {count:,} values; at most {MAX_GRID:,} are possible")
        points = [self.low + index * step for index in range(count)]
        return [int(point) for point in points] if self.kind == "int" else [_multiple(point, step) for point in points]

    def examples(self) -> list[Value]:
        """Values to check against the recipe: all choices, or one value of a range."""
        return list(self.choices) or [self.value(int(self.low) if self.kind == "int" else self.low)]


def word(key: str, value: Value) -> str:
    """``--key=value`` as the command line reads it."""
    if isinstance(value, str):
        return f"--{key}={value}"
    return f"--{key}={json.dumps(value)}"


def _implied(entry: Mapping[str, object], numbers: Mapping[str, float]) -> str:
    if "value" in entry:
        return "constant"
    if "values" in entry:
        return "categorical_w_probabilities" if "probabilities" in entry else "categorical"
    if "mu" in entry or "sigma" in entry:
        return "q_normal" if "q" in entry else "normal"
    if not {"min", "max"} <= set(entry):
        raise ValueError("expected value, values, or min and max")
    if "q" in entry:
        return "q_uniform"
    return "int_uniform" if all(isinstance(numbers[name], int) for name in ("min", "max")) else "uniform"


def _number(name: str, value: object) -> float:
    """A number; YAML 1.1 reads 1e-4, without a point, as text."""
    number: object = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = value
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    return number


def _quantum(distribution: str, numbers: Mapping[str, float]) -> float | None:
    if not distribution.startswith("q_"):
        if "q" in numbers:
            raise ValueError(f"q: {distribution} has no q; use q_{distribution}")
        return None
    q = numbers.get("q", 1)
    if not q > 0:
        raise ValueError(f"q: must be greater than 0, got {q}")
    return q


def _range(key: str, distribution: str, numbers: Mapping[str, float], q: float | None) -> Parameter:
    for name in ("min", "max"):
        if name not in numbers:
            raise ValueError(f"{distribution} needs {name}")
    low, high = numbers["min"], numbers["max"]
    if not low <= high:
        raise ValueError(f"min: {low:g} is greater than max, {high:g}")
    integer = distribution == "int_uniform"
    if integer and not (low == int(low) and high == int(high)):
        raise ValueError(f"min: int_uniform needs integers, got {low:g} and {high:g}")
    log = "log_uniform" in distribution
    if log and not distribution.endswith("values"):  # W&B: the exponents of e
        low, high = math.exp(low), math.exp(high)
    if log and not low > 0:
        raise ValueError(f"min: {distribution} needs values greater than 0, got {low:g}")
    if integer:
        low, high = int(low), int(high)
    return Parameter(key, distribution, "int" if integer else "float", low, high, log, q=q)


def _normal(key: str, distribution: str, numbers: Mapping[str, float], q: float | None) -> Parameter:
    mu, sigma = numbers.get("mu", 0.0), numbers.get("sigma", 1.0)
    if not sigma > 0:
        raise ValueError(f"sigma: must be greater than 0, got {sigma:g}")
    return Parameter(key, distribution, "float", _TAIL, 1 - _TAIL, q=q, normal=(mu, sigma))


def _choice(key: str, distribution: str, entry: Mapping[str, object]) -> Parameter:
    name = "value" if distribution == "constant" else "values"
    if name not in entry:
        raise ValueError(f"{distribution} needs {name}")
    values = [entry["value"]] if name == "value" else entry["values"]
    if not isinstance(values, list) or not values:
        raise ValueError(f"values: expected a list with at least one value, got {values!r}")
    choices = tuple(_scalar(value) for value in values)
    parameter = Parameter(key, distribution, "choice", choices=choices)
    draws = [(type(draw), draw) for draw in parameter.draws()]
    if repeated := [choice for choice, draw in zip(choices, draws, strict=True) if draws.count(draw) > 1]:
        raise ValueError(f"values: {repeated[0]!r} occurs more than once")
    if distribution != "categorical_w_probabilities":
        return parameter
    return Parameter(
        key, distribution, "float", choices=choices, cumulative=_cumulative(entry.get("probabilities"), len(choices))
    )


def _scalar(value: object) -> Value:
    if isinstance(value, str) and value[:1] in "+-.0123456789" and "e" in value.lower():
        try:
            return float(value)  # 1e-4, which YAML 1.1 reads as text
        except ValueError:
            return value
    if value is None or isinstance(value, bool | int | float | str | list | dict):
        return value
    raise ValueError(f"values: {value!r} is not a value of an option")


def _cumulative(probabilities: object, count: int) -> tuple[float, ...]:
    if not isinstance(probabilities, Sequence) or isinstance(probabilities, str) or len(probabilities) != count:
        raise ValueError(f"probabilities: expected a list of {count} numbers, got {probabilities!r}")
    numbers = [_number("probabilities", each) for each in probabilities]
    if min(numbers) < 0 or abs(sum(numbers) - 1) > 1e-6:
        raise ValueError(f"probabilities: must be at least 0 and add up to 1, got {probabilities!r}")
    return tuple(accumulate(numbers))


def _multiple(value: float, q: float) -> float:
    """The nearest multiple of q, without the rounding errors of the product; an integer if q is one."""
    multiple = round(value / q) * q
    return int(multiple) if float(q).is_integer() else float(f"{multiple:.12g}")
