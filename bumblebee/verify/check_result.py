"""The result of a check: measurements, each with the largest value that passes, or without a bound if it is a throughput."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Measurement:
    """One number.

    Args:
        name: what was measured.
        value: an error (lower is better) if it has a bound, otherwise a throughput (higher is better).
        bound: the largest value that passes; None for a throughput. NaN never passes.
        unit: of the value.
    """

    name: str
    value: float
    bound: float | None = None
    unit: str = ""

    @property
    def passed(self) -> bool:
        """Whether the value is within its bound."""
        return self.bound is None or self.value <= self.bound

    @property
    def badness(self) -> tuple[bool, float]:
        """Sort key over ranks: the worst value is the largest, NaN first of all."""
        return self.value != self.value, self.value if self.bound is not None else -self.value

    def __str__(self) -> str:
        if self.bound is None:
            return f"{self.name} {self.value:.3g} {self.unit}"
        if self.bound == 0:
            return f"{self.value:.0f} {self.name}"
        return f"{self.name} {self.value:.1e} {'<=' if self.passed else '>'} {self.bound:.1e}"


@dataclass(frozen=True)
class CheckResult:
    """The result of one check, on one rank or merged over all ranks.

    Args:
        measurements: in the same order on every rank.
        note: explains the measurements to the user.
        error: why the check did not finish.
        seconds: duration of the check.
        finished_at: Unix time. The earliest of several errors is usually the cause of the others.
        was_run: False if an earlier failure made the check impossible.
    """

    measurements: tuple[Measurement, ...] = ()
    note: str = ""
    error: str | None = None
    seconds: float = 0.0
    finished_at: float = 0.0
    was_run: bool = True

    @property
    def passed(self) -> bool:
        """Whether the check ran without an error and all measurements are within their bounds."""
        return self.was_run and self.error is None and all(measurement.passed for measurement in self.measurements)

    @property
    def has_verdict(self) -> bool:
        """Whether the check can fail: it has bounds, or it ended with an error."""
        return self.error is not None or any(measurement.bound is not None for measurement in self.measurements)

    def to_json(self) -> str:
        """Return the result as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CheckResult:
        """Rebuild a result from ``to_json``."""
        values = json.loads(text)
        return cls(**{**values, "measurements": tuple(Measurement(**fields) for fields in values["measurements"])})

    @classmethod
    def merge(cls, results: Sequence[CheckResult]) -> CheckResult:
        """Merge the results of all ranks: the worst of each measurement, or the earliest error with its rank."""
        failed = [(result.finished_at, rank) for rank, result in enumerate(results) if result.error is not None]
        if failed:
            rank = min(failed)[1]
            prefix = f"rank {rank}: " if len(results) > 1 else ""
            return cls(error=f"{prefix}{results[rank].error}", seconds=results[0].seconds)
        columns = zip(*(result.measurements for result in results), strict=True)
        worst = tuple(max(column, key=lambda measurement: measurement.badness) for column in columns)
        notes = list(dict.fromkeys(result.note for result in results if result.note))
        return cls(worst, "; ".join(notes), seconds=results[0].seconds)
