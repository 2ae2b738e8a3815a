"""Check names of ``bumblebee verify`` and its report read back."""

from __future__ import annotations

import re

ATTENTION, LOSS, GRADIENT, CURVE, RESUME = "attention kernel", "loss kernel", "gradient", "loss curve", "resume"
ACCUMULATION, OPTIMIZER = "accumulation", "optimizer"
MODEL, DATA = "model", "data"
RECOMPUTATION, LORA, DPO = "activation checkpointing", "LoRA", "DPO"


def statuses(printed: str) -> dict[str, str]:
    """Name -> status of each row of the table."""
    return dict(re.findall(r"^(\S.*?)  +(pass|FAIL|measured|not run) ", printed, flags=re.MULTILINE))
