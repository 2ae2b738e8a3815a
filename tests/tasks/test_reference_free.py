"""ORPO, SimPO and CPO against their formulas in float64, invalid pairs, invariance to batching, and refused options."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.training_runs import Pairs, Rows, small_model

from bumblebee import CPO, ORPO, SimPO
from bumblebee.tasks.orpo import log_odds

EMPTY = 2


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def mean(values):
    return sum(values) / len(values)


def odds(values):
    return mean(values) - math.log1p(-math.exp(mean(values)))


TASKS = {  # task, options; loss of a pair; score of a response; weights of the terms
    "orpo": (ORPO, {"pref_beta": 0.3}, lambda c, r: -log_sigmoid(odds(c) - odds(r)), mean, (0.3, 1.0)),
    "simpo": (SimPO, {"margin": 0.5}, lambda c, r: -log_sigmoid(2 * (mean(c) - mean(r)) - 0.5), mean, (1.0, 0.0)),
    "smoothed simpo": (
        SimPO,
        {"margin": 0.5, "label_smoothing": 0.1},
        lambda c, r: -0.9 * log_sigmoid(2 * (mean(c) - mean(r)) - 0.5) - 0.1 * log_sigmoid(0.5 - 2 * (mean(c) - mean(r))),
        mean,
        (1.0, 0.0),
    ),
    "cpo": (CPO, {"pref_beta": 0.2, "sft_weight": 0.7}, lambda c, r: -log_sigmoid(0.2 * (sum(c) - sum(r))), sum, (1.0, 0.7)),
}


@pytest.fixture(scope="module")
def model():
    return small_model(0)


@pytest.fixture(scope="module")
def pairs():
    data = Pairs(6, empty=[EMPTY])
    data.setup(0)
    return data


@pytest.fixture(scope="module")
def written_out(model, pairs):
    """Log-probability of each token of both responses, for each valid pair."""
    found = []
    for index, prompt, rows in pairs.train:
        if index != EMPTY:
            with torch.no_grad():
                logits = [model(row[None, :-1])[0].double().log_softmax(-1) for row in rows]
            both = zip(logits, rows, strict=True)
            found.append([[float(each[at - 1, row[at]]) for at in range(prompt, len(row))] for each, row in both])
    return found


@pytest.mark.parametrize("name", TASKS)
def test_loss_and_metrics_are_the_formulas(name, model, pairs, written_out):
    kind, options, formula, score, (weight, sft_weight) = TASKS[name]
    task, batch = kind(model, **options), pairs.collate(pairs.train)
    counts = {key: float(count) for key, count in task.counts(batch).items()}
    sums = {key: value.detach() for key, value in task.training_step(model, batch).items()}
    chosen = [value for pair in written_out for value in pair[0]]
    expected = weight * mean([formula(*pair) for pair in written_out]) - sft_weight * mean(chosen)
    assert float(task.total(sums, counts)) == pytest.approx(expected, rel=1e-5)
    beta = options.get("pref_beta", 2.0)
    assert float(sums["rewards/chosen"]) == pytest.approx(sum(beta * score(pair[0]) for pair in written_out), rel=1e-5)
    assert float(sums["rewards/accuracies"]) == sum(score(chosen) > score(rejected) for chosen, rejected in written_out)
    assert float(sums["logps/rejected"]) == pytest.approx(sum(sum(pair[1]) for pair in written_out), rel=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_padding_other_pairs_and_invalid_ones_do_not_matter(name, model, pairs):
    kind, options, *_ = TASKS[name]
    task = kind(model, **options)

    def gradient_and_sums(samples):
        model.zero_grad()
        sums = task.training_step(model, pairs.collate(samples))
        sum(sums[term] for term in task.weights).backward()
        return {key: value.grad.clone() for key, value in model.named_parameters()}, {
            key: float(value.detach()) for key, value in sums.items()
        }

    gradient, sums = gradient_and_sums(pairs.train)
    alone = [gradient_and_sums([pair]) for pair in pairs.train]
    for key, value in sums.items():
        assert sum(each[key] for _, each in alone) == pytest.approx(value, rel=1e-5, abs=1e-6), key
    for key, value in gradient.items():
        torch.testing.assert_close(sum(each[key] for each, _ in alone), value, rtol=1e-4, atol=1e-5)
    assert not any(value.any() for value in alone[EMPTY][0].values())


def test_log_odds_keep_their_digits_and_gradients_at_both_ends():
    exact = torch.tensor([-1e-5, -0.1, -0.7, -5.0, -60.0], dtype=torch.float64)
    given = exact.float().requires_grad_()
    odds = log_odds(given)
    torch.testing.assert_close(odds.double(), exact - torch.log(-torch.expm1(exact)), rtol=1e-5, atol=0)
    odds.sum().backward()
    torch.testing.assert_close(given.grad.double(), 1 / -torch.expm1(exact), rtol=1e-3, atol=0)
    certain = torch.zeros(1, requires_grad=True)
    log_odds(certain).sum().backward()
    assert certain.grad.isfinite().all()


@torch.no_grad()
def test_validation_metrics_are_those_of_training(model, pairs):
    task = ORPO(model)
    sums: dict[str, float] = {}
    for pair in pairs.train:
        for name, value in task.validation_step(model, pairs.collate([pair])).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    batch = pairs.collate(pairs.train)
    counts = {name: float(count) for name, count in task.counts(batch).items()}
    total = task.total(task.training_step(model, batch), counts)
    assert task.validation_metrics(sums)["validation_loss"] == pytest.approx(float(total), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ORPO, {"pref_beta": 0.0}, "pref_beta must be more than 0, got 0.0"),
        (SimPO, {"margin": -1.0}, "margin must be at least 0, got -1.0"),
        (CPO, {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        (CPO, {"sft_weight": -1.0}, "sft_weight must be at least 0, got -1.0"),
    ],
)
def test_an_option_out_of_range_is_refused(kind, options, message, model):
    with pytest.raises(ValueError, match=message):
        kind(model, **options)


def test_data_without_pairs_is_refused(model):
    rows = Rows(4)
    rows.setup(0)
    with pytest.raises(
        ValueError, match="data: SimPO needs pairs of responses, as from datamodules.Preferences; Rows has none"
    ):
        SimPO(model).setup(rows)
