"""A check: what is looked at, and what to distrust when it fails. The list of all of them, in their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bumblebee import distributed
from bumblebee.verify import attention, curve, gradient, loss, rates, resume
from bumblebee.verify.finding import Measure
from bumblebee.verify.setting import Setting

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
    several = distributed.world_size() > 1
    return CHECKS if several else tuple(check for check in CHECKS if check.name != "all-reduce")


KERNELS = (
    Check(
        "attention against its formula",
        lambda s: attention.measures(s.kernel, s.dtype, s.device),
        "this attention kernel is wrong: do not trust training or generation with it; --attention naive is the formula",
    ),
    Check(
        "loss against its formula",
        lambda s: loss.measures(s.dtype, s.device),
        "the loss or its gradient is wrong here: do not trust any training",
    ),
)
TRAINING = (
    Check(
        "ranks and accumulation",
        gradient.measures,
        "a step is not that of its whole batch: do not trust runs with several ranks or with trainer.accumulate above 1",
        trains=True, together=True,
    ),
    Check(
        "stage and precision",
        curve.measures,
        "training does not follow plain torch at this zero_stage and precision: do not trust its losses; try others",
        trains=True, together=True,
    ),
    Check(
        "save and resume",
        resume.measures,
        "resume is not exact: do not trust runs that were interrupted",
        trains=True, together=True,
    ),
)  # fmt: skip
RATES = (
    Check("matrix product", rates.matmul, "the device cannot be measured: do not plan with its speed"),
    Check("memory", rates.memory, "the device's memory cannot be measured: do not plan with its speed"),
    Check(
        "all-reduce", rates.all_reduce, "the ranks could not add up a large tensor: do not start runs on them", together=True
    ),
    Check("disk", rates.disk, "the folder could not be written: do not count on checkpoints there"),
)
CHECKS = (*KERNELS, *TRAINING, *RATES)
