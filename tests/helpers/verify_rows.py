"""The rows of the report, read back."""

from __future__ import annotations

import re

ATTENTION, LOSS = "attention against its formula", "loss against its formula"
STEP, CURVE, RESUME = "ranks and accumulation", "stage and precision", "save and resume"


def results(printed: str) -> dict[str, str]:
    """Name -> result of each row of the table."""
    return dict(re.findall(r"^(\S.*?)  +(pass|FAIL|measured|not run) ", printed, flags=re.MULTILINE))
