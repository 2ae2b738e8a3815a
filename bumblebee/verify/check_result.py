"""What a check came to: measures, each a number with the bound it must not pass, or a rate without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """One number.

    Args:
        name: of what.
        value: an error, of which less is better; a rate, of which more is, where there is no bound.
        bound: the largest value that passes; None for a rate. A value that is no number never passes.
        unit: of the value.
        rank: where it was measured.
    """

    name: str
    value: float
    bound: float | None = None
    unit: str = ""
    rank: int = 0

    @property
    def passed(self) -> bool:
        """Whether the value keeps within its bound."""
        return self.bound is None or self.value <= self.bound

    @property
    def badness(self) -> tuple[bool, float]:
        """For sorting: the worst of several ranks is the largest."""
        return self.value != self.value, self.value if self.bound is not None else -self.value

    def __str__(self) -> str:
        if self.bound is None:
            return f"{self.name} {self.value:.3g} {self.unit}"
        if self.bound == 0:
            return f"{self.value:.0f} {self.name}"
        return f"{self.name} {self.value:.1e} {'<=' if self.passed else '>'} {self.bound:.1e}"


@dataclass(frozen=True)
class Finding:
    """What a check came to, on one rank or, joined, on all.

    Args:
        measures: what it measured, in the same order on every rank.
        seconds: how long it took.
        error: why it could not be finished.
        note: what a reader of the measures should know.
        ended: when, in seconds since 1970: of several errors the earliest is the cause of the others.
        was_run: False where an earlier failure made it impossible.
    """

    measures: tuple[Measure, ...] = ()
    seconds: float = 0.0
    error: str | None = None
    note: str = ""
    ended: float = 0.0
    was_run: bool = True

    @property
    def passed(self) -> bool:
        """It ended, and all measures keep within their bounds."""
        return self.was_run and self.error is None and all(measure.passed for measure in self.measures)

    @property
    def judged(self) -> bool:
        """Whether anything was demanded."""
        return self.error is not None or any(measure.bound is not None for measure in self.measures)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Finding:
        """Back from JSON values."""
        return cls(**{**values, "measures": tuple(Measure(**measure) for measure in values["measures"])})

    @classmethod
    def joined(cls, findings: Sequence[Finding]) -> Finding:
        """Of all ranks: the worst of each measure, or the earliest error with its rank."""
        failed = [(finding.ended, rank) for rank, finding in enumerate(findings) if finding.error is not None]
        if failed:
            rank = min(failed)[1]
            where = f"rank {rank}: " if len(findings) > 1 else ""
            return cls((), findings[0].seconds, f"{where}{findings[rank].error}")
        columns = zip(*(finding.measures for finding in findings), strict=True)
        worst = tuple(max(column, key=lambda measure: measure.badness) for column in columns)
        notes = list(dict.fromkeys(finding.note for finding in findings if finding.note))
        return cls(worst, findings[0].seconds, None, "; ".join(notes))
