"""A check: what is looked at, and what to distrust when it fails. The list of all of them, in their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bumblebee.distributed import process_group
from bumblebee.verify import attention_check, gradient_check, loss_check, loss_curve, machine_throughput, resume_check
from bumblebee.verify.check_result import Measure
from bumblebee.verify.context import Setting

Measured = list[Measure] | tuple[list[Measure], str]


@dataclass(frozen=True)
class Check:
    """One row of the report.

    Args:
        name: of the row.
        measures: does it, on every rank; perhaps with a note.
        distrust: what a failure means for the user.
        trains: it runs the model, so that a wrong kernel makes it fail too.
        together: ranks talk to each other in it.
    """

    name: str
    measures: Callable[[Setting], Measured]
    distrust: str
    trains: bool = False
    together: bool = False


def all_checks() -> tuple[Check, ...]:
    """Those that can be made with this number of ranks."""
    several = process_group.world_size() > 1
    return CHECKS if several else tuple(check for check in CHECKS if check.name != "all-reduce")


KERNELS = (
    Check(
        "attention against its formula",
        lambda s: attention_check.measures(s.kernel, s.dtype, s.device),
        "this attention kernel is wrong: do not trust training or generation with it; --attention naive is the formula",
    ),
    Check(
        "loss against its formula",
        lambda s: loss_check.measures(s.dtype, s.device),
        "the loss or its gradient is wrong here: do not trust any training",
    ),
)
TRAINING = (
    Check(
        "ranks and accumulation",
        gradient_check.measures,
        "a step is not that of its whole batch: do not trust runs with several ranks or with trainer.accumulate above 1",
        trains=True, together=True,
    ),
    Check(
        "stage and precision",
        loss_curve.measures,
        "training does not follow plain torch at this zero_stage and precision: do not trust its losses; try others",
        trains=True, together=True,
    ),
    Check(
        "save and resume",
        resume_check.measures,
        "resume is not exact: do not trust runs that were interrupted",
        trains=True, together=True,
    ),
)  # fmt: skip
RATES = (
    Check("matrix product", machine_throughput.matmul, "the device cannot be measured: do not plan with its speed"),
    Check("memory", machine_throughput.memory, "the device's memory cannot be measured: do not plan with its speed"),
    Check(
        "all-reduce",
        machine_throughput.all_reduce,
        "the ranks could not add up a large tensor: do not start runs on them",
        together=True,
    ),
    Check("disk", machine_throughput.disk, "the folder could not be written: do not count on checkpoints there"),
)
CHECKS = (*KERNELS, *TRAINING, *RATES)
