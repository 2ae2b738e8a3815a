"""What the user reads: one table, and for each failure a line that says what to distrust."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from bumblebee.verify.check import Check
from bumblebee.verify.check_result import Finding

WIDTH = 128


def table(found: Sequence[tuple[Check, Finding]]) -> str:
    """One row a check: name, result, figures, seconds."""
    first = max(len(check.name) for check, _ in found)
    room = WIDTH - first - len("  measured  ") - len("  seconds")
    lines = [f"{'check':<{first}}  {'result':<8}  {'figures':<{room}}  seconds"]
    for check, finding in found:
        figures = _wrapped(finding, room)
        lines.append(f"{check.name:<{first}}  {_result(finding):<8}  {figures[0]:<{room}}  {finding.seconds:7.1f}")
        lines += [" " * (first + 12) + line for line in figures[1:]]
    return "\n".join(lines)


def verdict(found: Sequence[tuple[Check, Finding]]) -> str:
    """All passed, or what to distrust."""
    lines = []
    kernel_failed = False
    for check, finding in found:
        if finding.passed or not finding.was_run:
            continue
        unknown = "it could not be finished; " if finding.error is not None else ""
        follows = " (perhaps only because of the failure above)" if check.trains and kernel_failed else ""
        lines.append(f"FAIL {check.name}: {unknown}{check.distrust}{follows}")
        kernel_failed |= not check.trains
    if left_out := [check.name for check, finding in found if not finding.was_run]:
        lines.append(f"not run: {', '.join(left_out)}")
    return "\n".join(lines) or "all passed"


def _result(finding: Finding) -> str:
    if not finding.was_run:
        return "not run"
    if not finding.passed:
        return "FAIL"
    return "pass" if finding.judged else "measured"


def _wrapped(finding: Finding, room: int) -> list[str]:
    """The figures in lines that end between two of them; an error or a note in lines of its own."""
    lines = [""]
    for figure in map(str, finding.measures):
        joined = f"{lines[-1]}, {figure}" if lines[-1] else figure
        if len(joined) < room:
            lines[-1] = joined
        else:
            lines[-1] += ","
            lines.append(figure)
    prose = [line for text in (finding.error, finding.note) if text for line in textwrap.wrap(text, room)]
    return [line for line in lines + prose if line] or [""]
