"""Options of ``bumblebee verify``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class VerifyOptions:
    """Options of a verification. Use those of the run that follows.

    Args:
        precision: bf16, fp16 (GPU only) or fp32.
        zero_stage: DeepSpeed's ZeRO stage, 0 to 3.
        attention: auto, flash3, flash, varlen, sdpa or naive.
        device: auto, cpu, cuda or cuda:N.
        folder: on the disk of the runs, for verify.json; temporary checkpoints go into a hidden folder there, which is removed
            at the end. null: runs if that folder exists, otherwise the current folder.
    """

    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 1
    attention: str = "auto"
    device: str = "auto"
    folder: str | None = None
