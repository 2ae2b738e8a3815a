"""Learning-rate schedules: point by point transformers' curves where it has one, and what is ours by its own words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from bumblebee.optim import (
    Constant,
    Cosine,
    InverseSqrt,
    Linear,
    Polynomial,
    ReduceOnPlateau,
    Schedule,
    WarmupStableDecay,
)  # fmt: skip

WARMUP, TOTAL, RATE = 7, 60, 3e-4
CURVES: dict[str, tuple[Schedule, Callable[[Any], Any]]] = {
    "constant": (Constant(), lambda o: transformers.get_constant_schedule(o)),
    "constant_with_warmup": (
        Constant(warmup_steps=WARMUP),
        lambda o: transformers.get_constant_schedule_with_warmup(o, WARMUP),
    ),
    "linear": (Linear(warmup_steps=WARMUP), lambda o: transformers.get_linear_schedule_with_warmup(o, WARMUP, TOTAL)),
    "cosine": (Cosine(warmup_steps=WARMUP), lambda o: transformers.get_cosine_schedule_with_warmup(o, WARMUP, TOTAL)),
    "cosine_with_restarts": (
        Cosine(warmup_steps=WARMUP, cycles=3),
        lambda o: transformers.get_cosine_with_hard_restarts_schedule_with_warmup(o, WARMUP, TOTAL, num_cycles=3),
    ),
    "cosine_with_min_lr": (
        Cosine(warmup_steps=WARMUP, min_ratio=0.1),
        lambda o: transformers.get_cosine_with_min_lr_schedule_with_warmup(o, WARMUP, TOTAL, min_lr_rate=0.1),
    ),
    "polynomial": (
        Polynomial(warmup_steps=WARMUP, power=2.0, min_ratio=0.1),
        lambda o: transformers.get_polynomial_decay_schedule_with_warmup(o, WARMUP, TOTAL, lr_end=0.1 * RATE, power=2.0),
    ),
    "inverse_sqrt": (InverseSqrt(warmup_steps=WARMUP), lambda o: transformers.get_inverse_sqrt_schedule(o, WARMUP)),
    "inverse_sqrt_timescale": (
        InverseSqrt(warmup_steps=WARMUP, timescale=40),
        lambda o: transformers.get_inverse_sqrt_schedule(o, WARMUP, timescale=40),
    ),
    "warmup_stable_decay": (
        WarmupStableDecay(warmup_steps=WARMUP, decay_ratio=0.25, min_ratio=0.05),
        lambda o: transformers.get_wsd_schedule(
            o, num_warmup_steps=WARMUP, num_decay_steps=15, num_training_steps=TOTAL, min_lr_ratio=0.05
        ),
    ),
    "warmup_stable_decay_linear": (
        WarmupStableDecay(warmup_steps=WARMUP, decay_ratio=0.25, shape="linear"),
        lambda o: transformers.get_wsd_schedule(
            o, num_warmup_steps=WARMUP, num_decay_steps=15, num_training_steps=TOTAL, decay_type="linear"
        ),
    ),
}  # fmt: skip


def rates_of(make: Callable[[Any], Any], steps: int) -> list[float]:
    """The learning rate that each of transformers' steps uses."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", CURVES)
def test_curve_equals_transformers(name: str) -> None:
    schedule, make = CURVES[name]
    ours = [RATE * schedule.factor(step, TOTAL) for step in range(TOTAL)]
    first = WARMUP if name == "warmup_stable_decay" else 0  # its warm-up begins at min_ratio there, at 0 here as everywhere
    assert ours[first:] == pytest.approx(rates_of(make, TOTAL)[first:], rel=1e-9, abs=1e-12)


def test_reduce_on_plateau_equals_torch() -> None:
    losses = [3.0, 2.5, 2.4999, 2.6, 2.5, 2.45, 2.6, 2.6, 2.6, 2.6, 2.6, 2.2, 2.3, 2.3, 2.3, 2.3, 2.3, 2.3]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, min_lr=0.2 * RATE, eps=0)
    ours = ReduceOnPlateau(reduce=0.5, patience=2, min_ratio=0.2)
    for loss in losses:
        theirs.step(loss)
        ours.observe({"validation_loss": loss})
        assert RATE * ours.factor(5, 10) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert ours.ratio == 0.2  # the losses above did make it fall, down to the floor


def test_reduce_on_plateau_resumes_from_its_state() -> None:
    whole, first = ReduceOnPlateau(patience=1), ReduceOnPlateau(patience=1)
    for loss in (1.0, 1.1):
        whole.observe({"validation_loss": loss}), first.observe({"validation_loss": loss})
    second = ReduceOnPlateau(patience=1)
    second.load_state_dict(first.state_dict())
    for schedule in (whole, second):
        schedule.observe({"validation_loss": 1.2})
    assert second.state_dict() == whole.state_dict() and second.ratio == pytest.approx(0.1)


def test_reduce_on_plateau_refuses_an_unknown_metric() -> None:
    with pytest.raises(ValueError, match="'loss' is not measured; metrics: validation_loss"):
        ReduceOnPlateau(metric="loss").observe({"validation_loss": 1.0})


FALLING = [Linear, Cosine, Polynomial, InverseSqrt, WarmupStableDecay, Constant]


@given(kind=st.sampled_from(FALLING), ratio=st.floats(0, 0.99), total=st.integers(1, 300))
def test_factors_are_between_0_and_1(kind: type[Schedule], ratio: float, total: int) -> None:
    factors = [kind(warmup_ratio=ratio).factor(step, total) for step in range(total)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert max(factors) > 0  # also in a run of a single step


def test_warmup_ratio_is_rounded_up() -> None:
    assert Cosine(warmup_ratio=0.1).warmup_of(41) == 5
    assert Cosine(warmup_ratio=0.1, warmup_steps=2).warmup_of(41) == 2


@pytest.mark.parametrize("kind", [Linear, Cosine, Polynomial])
def test_decay_ends_one_step_after_the_last(kind: type[Schedule]) -> None:
    schedule = kind(warmup_ratio=0.1)
    assert schedule.factor(100, 100) == pytest.approx(0, abs=1e-12)
    assert 0 < schedule.factor(99, 100) < 0.02


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(warmup_ratio=1.0), "warmup_ratio must be in"),
        (lambda: Linear(warmup_steps=-1), "warmup_steps must be at least 0"),
        (lambda: Cosine(cycles=0), "cycles must be at least 1"),
        (lambda: Cosine(min_ratio=1.5), "min_ratio must be in"),
        (lambda: Polynomial(power=0), "power must be more than 0"),
        (lambda: InverseSqrt(timescale=0), "timescale must be at least 1"),
        (lambda: ReduceOnPlateau(reduce=1.0), "reduce must be between"),
        (lambda: WarmupStableDecay(decay_ratio=math.inf), "decay_ratio must be in"),
    ],
)
def test_invalid_options_are_refused(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
