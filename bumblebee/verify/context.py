"""The context of a verification: the user's options resolved for this rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from bumblebee.distributed import process_group
from bumblebee.nn.attention_kernels import select_kernel
from bumblebee.optim import GroupRule
from bumblebee.trainer import Trainer
from bumblebee.verify.subject import Subject
from bumblebee.verify.verify_options import VerifyOptions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Context:
    """Passed to every check.

    Args:
        options: the user's options.
        device: of this rank.
        folder: temporary folder of the training runs, shared by all ranks.
        subject: the model and data that the user is about to train.
    """

    options: VerifyOptions
    device: torch.device
    folder: Path
    subject: Subject = field(default_factory=Subject)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return DTYPES[self.options.precision]

    @property
    def kernel(self) -> str:
        """The attention kernel that a run with these options selects."""
        return select_kernel(self.options.attention, self.dtype)

    @property
    def fp32_attention(self) -> str:
        """The attention of checks that run in fp32, which flash attention does not support."""
        return "naive" if self.kernel == "naive" else "auto"

    def build_trainer(
        self,
        max_steps: int,
        accumulate: int,
        gradient_clip: float | None,
        precision: str | None = None,
        resume: str | None = None,
        groups: list[GroupRule] | None = None,
    ) -> Trainer:
        """Build the trainer of a training run: the user's stage and device, micro-batches of two rows.

        At stages 1 to 3 fp16 starts with a loss scale of 2^8: searching down from 2^16 would skip most of the few steps.
        """
        precision = precision or self.options.precision
        scale = {"fp16": {"initial_scale_power": 8}} if precision == "fp16" and self.options.zero_stage > 0 else None
        return Trainer(
            max_steps=max_steps, micro_batch_size=2, accumulate=accumulate, precision=precision,  # type: ignore[arg-type]
            zero_stage=self.options.zero_stage, gradient_clip=gradient_clip, device=self.options.device, deepspeed=scale,
            resume=resume, groups=groups,
        )  # fmt: skip


def resolve_options(options: VerifyOptions) -> tuple[torch.device, Path]:
    """Return this rank's device and the parent of the temporary folder.

    Raises:
        ValueError: the options cannot be used on this machine.
    """
    device = process_group.pick_device(options.device)
    if options.precision == "fp16" and device.type == "cpu":
        raise ValueError("precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    select_kernel(options.attention, DTYPES[options.precision])
    if options.folder is not None:
        return device, Path(options.folder)
    return device, Path("runs") if Path("runs").is_dir() else Path()
