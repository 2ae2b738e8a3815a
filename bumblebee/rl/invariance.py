"""What GRPO's ``batch_invariant`` needs of a model and a run; see ``bumblebee/nn/batch_invariant.py``."""

from __future__ import annotations

import torch
from torch import nn

from bumblebee.nn.attention_kernels import kernel_of
from bumblebee.nn.block_forward import is_compiled


def check_invariant_model(model: nn.Module) -> None:
    """Raise for a model that is not batch-invariant.

    Raises:
        ValueError: its attention is not ours, its blocks are compiled, or its attention has dropout.
    """
    if kernel_of(model, torch.float32) is None:
        raise ValueError(f"task.batch_invariant: needs a model with Bumblebee's attention; {type(model).__name__} has its own")
    for name, module in model.named_modules():
        if is_compiled(module):
            raise ValueError(f"task.batch_invariant: does not support compiled blocks, such as {name}; remove the transform")
        if getattr(module, "dropout", None) and isinstance(module.dropout, float):
            raise ValueError(f"task.batch_invariant: does not support attention_dropout, which is {module.dropout}")


def check_invariant_run(device: torch.device, precision: str, zero_stage: int) -> None:
    """Raise for a run that does not compute in fp32 or bf16 on a CPU, or does so under autocast.

    Raises:
        ValueError: one of these.
    """
    if device.type != "cpu":
        raise ValueError(f"task.batch_invariant: computes on a CPU only, and this run on {device}; set it to false")
    if precision != "fp32" and not (precision == "bf16" and zero_stage > 0):
        raise ValueError(
            f"task.batch_invariant: needs trainer.precision fp32, or bf16 at zero_stage 1 to 3; got {precision} at zero_stage"
            f" {zero_stage}"
        )
