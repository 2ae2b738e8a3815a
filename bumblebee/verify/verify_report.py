"""The report of ``bumblebee verify``: a table of all checks, and one line for each failure."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from bumblebee.training.verification_record import CheckRecord
from bumblebee.verify.check import Check
from bumblebee.verify.check_result import CheckResult, Measurement

WIDTH = 128
Results = Sequence[tuple[Check, CheckResult]]


def table(results: Results) -> str:
    """One row per check: name, status, measurements, seconds."""
    first = max(len(check.name) for check, _ in results)
    room = WIDTH - first - len("  measured  ") - len("  seconds")
    lines = [f"{'check':<{first}}  {'status':<8}  {'measurements':<{room}}  seconds"]
    for check, result in results:
        cell = _measurement_lines(result, room)
        lines.append(f"{check.name:<{first}}  {_status(result):<8}  {cell[0]:<{room}}  {result.seconds:7.1f}")
        lines += [" " * (first + 12) + line for line in cell[1:]]
    return "\n".join(lines)


def verdict(results: Results) -> str:
    """``all checks passed``, or a line for each failure with its consequence."""
    lines = []
    kernel_failed = False
    for check, result in results:
        if result.passed or not result.was_run:
            continue
        diagnosis = check.diagnosis if result.error is None else "did not finish"
        follows = " (possibly a consequence of the failure above)" if check.uses_model and kernel_failed else ""
        above = ", ".join(measurement.name for measurement in result.measurements if not measurement.passed)
        lines.append(f"FAIL {check.name}: {diagnosis}{f' ({above})' if above else ''}; {check.consequence}{follows}")
        kernel_failed |= not check.uses_model
    if not_run := [check.name for check, result in results if not result.was_run]:
        lines.append(f"not run: {', '.join(not_run)}")
    return "\n".join(lines) or "all checks passed"


def check_records(results: Results) -> list[CheckRecord]:
    """The rows of the table for verify.json. A value that is not a number is null."""
    return [
        {
            "name": check.name,
            "status": _status(result),
            "seconds": round(result.seconds, 1),
            "measurements": [_measurement_record(measurement) for measurement in result.measurements],
            "error": result.error,
            "note": result.note,
        }
        for check, result in results
    ]


def _measurement_record(measurement: Measurement) -> dict[str, object]:
    value = measurement.value if math.isfinite(measurement.value) else None
    return {**asdict(measurement), "value": value, "passed": measurement.passed}


def _status(result: CheckResult) -> str:
    if not result.was_run:
        return "not run"
    if not result.passed:
        return "FAIL"
    return "pass" if result.has_verdict else "measured"


def _measurement_lines(result: CheckResult, width: int) -> list[str]:
    """Measurements wrapped between two of them, followed by the error or note on lines of their own."""
    lines = [""]
    for text in map(str, result.measurements):
        joined = f"{lines[-1]}, {text}" if lines[-1] else text
        if len(joined) < width:
            lines[-1] = joined
        else:
            lines[-1] += ","
            lines.append(text)
    prose = [line for text in (result.error, result.note) if text for line in textwrap.wrap(text, width)]
    return [line for line in lines + prose if line] or [""]
