"""Where a verification runs: the options, settled for this rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bumblebee.distributed import process_group
from bumblebee.nn.attention_kernels import choose
from bumblebee.trainer import Trainer
from bumblebee.verify.verify_options import VerifyOptions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """What every check is given.

    Args:
        options: what the user chose.
        device: of this rank.
        folder: for trial runs; shared by all ranks, gone afterwards.
    """

    options: VerifyOptions
    device: torch.device
    folder: Path

    @property
    def dtype(self) -> torch.dtype:
        """What matrices are multiplied in."""
        return DTYPES[self.options.precision]

    @property
    def kernel(self) -> str:
        """The attention kernel that such a run takes."""
        return choose(self.options.attention, self.dtype)

    def trainer(self, precision: str, clip: float | None, accumulate: int, steps: int, **others: Any) -> Trainer:
        """The trainer of a trial: the user's stage and device, two rows in a micro-batch.

        fp16 begins with a loss scale of 2^8 on stages 1 to 3: looking for one from 2^16 down would take the trial's few steps.
        """
        scale = {"fp16": {"initial_scale_power": 8}} if precision == "fp16" and self.options.zero_stage > 0 else None
        return Trainer(
            max_steps=steps, micro_batch_size=2, accumulate=accumulate, precision=precision,  # type: ignore[arg-type]
            zero_stage=self.options.zero_stage, gradient_clip=clip, device=self.options.device, deepspeed=scale,
            **others,
        )  # fmt: skip


def settle(options: VerifyOptions) -> tuple[torch.device, Path]:
    """The device of this rank, and the folder in which the hidden one is to be.

    Raises:
        ValueError: options that cannot be met here.
    """
    device = process_group.pick_device(options.device)
    if options.precision == "fp16" and device.type == "cpu":
        raise ValueError("precision fp16 needs a GPU; on a CPU take bf16 or fp32")
    choose(options.attention, DTYPES[options.precision])
    if options.folder is not None:
        return device, Path(options.folder)
    return device, Path("runs") if Path("runs").is_dir() else Path()
