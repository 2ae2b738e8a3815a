"""Scaling laws: exponents of exact data are recovered, and bands contain the truth."""

from __future__ import annotations

import random

import pytest

from bumblebee.sweep.ladder.scaling_law import ScalingLaw, TrainedSize, fit, standard_error

CHINCHILLA = ScalingLaw(1.69, 406.4, 0.34, 410.7, 0.28)
SIZES = [1e6, 3e6, 1e7, 3e7]


def ladder(law: ScalingLaw, ratios: list[float], noise: float = 0.0) -> list[TrainedSize]:
    draw = random.Random(0)
    return [TrainedSize(n, n * r, law.loss(n, n * r) * (1 + noise * draw.gauss(0, 1))) for r in ratios for n in SIZES]


def test_exponents_of_exact_data_are_recovered():
    law = fit(ladder(CHINCHILLA, [5, 20, 80]))
    for name in ("e", "a", "alpha", "b", "beta"):
        assert getattr(law, name) == pytest.approx(getattr(CHINCHILLA, name), rel=0.01), name


@pytest.mark.parametrize("sizes", [3, 4])
def test_one_ratio_gives_one_exponent_and_the_next_loss(sizes):
    truth = ScalingLaw(1.8, 60, 0.21)
    runs = ladder(truth, [20])[:sizes]
    law = fit(runs)
    assert (law.e, law.a, law.alpha) == pytest.approx((truth.e, truth.a, truth.alpha), rel=1e-3) and law.b == 0
    assert law.loss(1e8, 2e9) == pytest.approx(truth.loss(1e8, 2e9), rel=1e-5)
    assert law.formula() == "1.8 + 60 / N^0.21"
    if sizes == 4:
        assert standard_error(runs, 1e8, 2e9) < 1e-4


def test_noise_widens_the_band_which_contains_the_truth():
    truth = ScalingLaw(1.8, 60, 0.21)
    errors = []
    for noise in (0.002, 0.01):
        runs = ladder(truth, [20], noise)
        errors.append(standard_error(runs, 1e8, 2e9))
        assert abs(fit(runs).loss(1e8, 2e9) - truth.loss(1e8, 2e9)) < 2 * errors[-1]
    assert 0 < errors[0] < errors[1]
