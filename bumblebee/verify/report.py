"""What the user reads: one table, and for each failure a line that says what to distrust."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from bumblebee.verify.check import Check
from bumblebee.verify.finding import Finding

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
    failed = [check for check, finding in found if not finding.passed]
    if not failed:
        return "all passed"
    kernels = any(not check.trains for check in failed)
    lines = []
    for check in failed:
        follows = " (perhaps only because of the failure above)" if check.trains and check is not failed[0] and kernels else ""
        lines.append(f"FAIL {check.name}: {check.distrust}{follows}")
    return "\n".join(lines)


def _result(finding: Finding) -> str:
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
    return [line for line in lines if line] + prose
