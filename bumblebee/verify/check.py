"""A check and what its failure means; the list of all checks in their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bumblebee.distributed import process_group
from bumblebee.verify.check_result import CheckResult
from bumblebee.verify.checks import (
    accumulation_check,
    attention_check,
    checkpointing_check,
    data_check,
    dpo_check,
    gradient_check,
    lora_check,
    loss_check,
    loss_curve_check,
    machine_throughput,
    model_check,
    optimizer_check,
    resume_check,
)
from bumblebee.verify.context import Context
from bumblebee.verify.subject import Subject


@dataclass(frozen=True)
class Check:
    """One row of the report.

    Args:
        name: shown in the report.
        run: performs the check on this rank.
        diagnosis: what a value above its bound means; empty for throughputs, which have no bounds.
        consequence: what the user should not rely on after a failure.
        uses_model: trains the model, so that a broken kernel makes this check fail as well.
        collective: ranks communicate in it.
    """

    name: str
    run: Callable[[Context], CheckResult]
    diagnosis: str
    consequence: str
    uses_model: bool = False
    collective: bool = False


def all_checks(subject: Subject) -> tuple[Check, ...]:
    """The checks that are possible with this number of ranks and for this model."""
    impossible = {ALL_REDUCE: process_group.world_size() == 1, MODEL: subject.model_class is None, DATA: subject.run is None}
    return tuple(check for check in CHECKS if not impossible.get(check, False))


KERNELS = (
    Check(
        "attention kernel",
        attention_check.run,
        "the attention kernel is wrong",
        "training and generation with it are unreliable; use --attention naive",
    ),
    Check("loss kernel", loss_check.run, "the loss or its gradient is wrong", "no training on this machine is reliable"),
)
MODEL = Check(
    "model",
    model_check.run,
    "the model does not compute what its config says",
    "models trained with these options cannot be trusted, and other programs compute something else from their weights",
    uses_model=True,
)
DATA = Check(
    "data",
    data_check.run,
    "the recipe's batches are not what its files hold",
    "no model trained on this data can be trusted",
)
TRAINING = (
    Check(
        "gradient",
        gradient_check.run,
        "a step does not compute the gradient of its whole batch",
        "runs with several ranks or trainer.accumulate above 1 are unreliable",
        uses_model=True, collective=True,
    ),
    Check(
        "accumulation",
        accumulation_check.run,
        "gradients of micro-batches are not added up in fp32, or not averaged over ranks",
        "runs at this zero_stage and precision lose small gradients; use another stage or fp32",
        collective=True,
    ),
    Check(
        "optimizer",
        optimizer_check.run,
        "a step of AdamW is not that of torch with the recipe's options",
        "weight decay, betas, eps, learning rates and gradient_clip of a recipe are unreliable at this stage and precision",
        collective=True,
    ),
    Check(
        "loss curve",
        loss_curve_check.run,
        "training at this zero_stage and precision diverges from plain PyTorch",
        "its losses are unreliable; use another stage or precision",
        uses_model=True, collective=True,
    ),
    Check(
        "resume",
        resume_check.run,
        "resuming from a checkpoint is not exact",
        "interrupted runs are unreliable",
        uses_model=True, collective=True,
    ),
)  # fmt: skip
METHODS = (
    Check(
        "activation checkpointing",
        checkpointing_check.run,
        "recomputed blocks differ from those of the forward pass",
        "runs with bumblebee.transforms.ActivationCheckpointing and dropout are unreliable",
        uses_model=True,
    ),
    Check(
        "LoRA",
        lora_check.run,
        "LoRA does not train A and B of W + (alpha / rank) B A alone",
        "adapters are unreliable; train all weights",
        uses_model=True, collective=True,
    ),
    Check(
        "DPO",
        dpo_check.run,
        "the loss, its gradient or the reference is not that of DPO",
        "preference training is unreliable",
        uses_model=True, collective=True,
    ),
)  # fmt: skip
ALL_REDUCE = Check(
    "all-reduce bandwidth",
    machine_throughput.all_reduce_bandwidth,
    "",
    "multi-rank runs will probably fail",
    collective=True,
)
THROUGHPUT = (
    Check("matmul throughput", machine_throughput.matmul_throughput, "", "the compute throughput is unknown"),
    Check("memory bandwidth", machine_throughput.memory_bandwidth, "", "the memory bandwidth is unknown"),
    ALL_REDUCE,
    Check("disk write", machine_throughput.disk_write, "", "checkpoints cannot be saved in this folder"),
)
CHECKS = (*KERNELS, MODEL, DATA, *TRAINING, *METHODS, *THROUGHPUT)
