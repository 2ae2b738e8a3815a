"""DPO's losses and metrics against their formulas, invalid pairs, invariance to batching, and refused options."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.training_runs import Pairs, Rows, small_model

from bumblebee.nn import IGNORE_INDEX
from bumblebee.tasks.dpo import DPO
from bumblebee.tasks.reference import FrozenReference
from bumblebee.tasks.reference_cache import CachedReference

EMPTY = 2


@pytest.fixture(scope="module")
def models():
    """The policy, and another model as its reference."""
    return small_model(0), small_model(1).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pairs():
    data = Pairs(6, empty=[EMPTY])
    data.setup(0)
    return data


def task_of(models, **options):
    task = DPO(models[0], **options)
    task.reference_model = FrozenReference(models[1])
    return task


@pytest.fixture(scope="module")
def written_out(models, pairs):
    """Log-probability of each token of each valid pair, from the logits: of the policy and of the reference."""
    log_probs = []
    for index, prompt, rows in pairs.train:
        if index != EMPTY:
            log_probs.append([[token_log_probabilities(model, prompt, row) for row in rows] for model in models])
    return log_probs


def token_log_probabilities(model, prompt, row):
    with torch.no_grad():
        logits = model(row[None, :-1])[0].double().log_softmax(-1)
    return [float(logits[at - 1, row[at]]) for at in range(prompt, len(row))]


def h_of(policy, reference, weigh=sum):
    return weigh(policy[0]) - weigh(reference[0]) - (weigh(policy[1]) - weigh(reference[1]))


def mean(values):
    return sum(values) / len(values)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def discounted(policy, reference):
    """ld_alpha 0.3, for the policy alone."""
    m = min(len(side) for side in policy)
    return h_of([[*side[:m], *(0.3 * value for value in side[m:])] for side in policy], reference)


FORMULAS = {  # options; the loss of a pair
    "sigmoid": ({}, lambda p, r: -log_sigmoid(0.1 * h_of(p, r))),
    "smoothed": (
        {"pref_beta": 0.7, "dpo_label_smoothing": 0.2},
        lambda p, r: -0.8 * log_sigmoid(0.7 * h_of(p, r)) - 0.2 * log_sigmoid(-0.7 * h_of(p, r)),
    ),
    "robust": (
        {"loss_type": "robust", "pref_beta": 0.7, "dpo_label_smoothing": 0.2},
        lambda p, r: (-0.8 * log_sigmoid(0.7 * h_of(p, r)) + 0.2 * log_sigmoid(-0.7 * h_of(p, r))) / 0.6,
    ),
    "hinge": ({"loss_type": "hinge", "pref_beta": 2.0}, lambda p, r: max(0.0, 1 - 2.0 * h_of(p, r))),
    "ipo": ({"loss_type": "ipo"}, lambda p, r: (h_of(p, r) - 1 / 0.2) ** 2),
    "ipo by the mean": ({"loss_type": "ipo", "length_normalised": True}, lambda p, r: (h_of(p, r, mean) - 1 / 0.2) ** 2),
    "length-desensitised": ({"ld_alpha": 0.3}, lambda p, r: -log_sigmoid(0.1 * discounted(p, r))),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_loss_is_the_formula_summed_over_valid_pairs(name, models, pairs, written_out):
    options, formula = FORMULAS[name]
    batch = pairs.collate(pairs.train)
    task = task_of(models, **options)
    sums = task.training_step(models[0], batch)
    assert task.counts(batch)["dpo"] == len(written_out) == 5
    assert float(sums["dpo"].detach()) == pytest.approx(sum(formula(*pair) for pair in written_out), rel=1e-5)


def test_pairs_cover_both_sides_of_hinge_and_length(written_out):
    """Otherwise the tests above would miss branches of the formulas."""
    assert {1 - 2.0 * h_of(*pair) > 0 for pair in written_out} == {True, False}
    assert {len(policy[0]) > len(policy[1]) for policy, _ in written_out} == {True, False}


def test_metrics_are_implicit_rewards_and_log_probabilities(models, pairs, written_out):
    given = task_of(models, ld_alpha=0.5).training_step(*_step(models, pairs))
    sums = {name: float(value.detach()) for name, value in given.items()}
    rewards = [[0.1 * (sum(p) - sum(r)) for p, r in zip(policy, reference, strict=True)] for policy, reference in written_out]
    assert sums["rewards/chosen"] == pytest.approx(sum(chosen for chosen, _ in rewards), abs=1e-5)
    assert sums["rewards/rejected"] == pytest.approx(sum(rejected for _, rejected in rewards), abs=1e-5)
    assert sums["rewards/margins"] == pytest.approx(sums["rewards/chosen"] - sums["rewards/rejected"], abs=1e-12)
    assert sums["rewards/accuracies"] == sum(chosen > rejected for chosen, rejected in rewards)
    assert sums["logps/chosen"] == pytest.approx(sum(sum(policy[0]) for policy, _ in written_out), rel=1e-6)
    assert sums["logps/accuracies"] == sum(sum(policy[0]) > sum(policy[1]) for policy, _ in written_out)
    assert sums["logps/rejected"] == pytest.approx(sum(sum(policy[1]) for policy, _ in written_out), rel=1e-6)


def _step(models, pairs):
    return models[0], pairs.collate(pairs.train)


def test_sft_term_is_the_mean_loss_of_chosen_tokens(models, pairs, written_out):
    task = task_of(models, sft_weight=0.25)
    batch = pairs.collate(pairs.train)
    sums = {name: value.detach() for name, value in task.training_step(models[0], batch).items()}
    counts = task.counts(batch)
    chosen = [value for policy, _ in written_out for value in policy[0]]
    assert counts["sft"] == len(chosen)
    assert float(sums["sft"]) == pytest.approx(-sum(chosen), rel=1e-6)
    total = task.total(sums, {name: float(count) for name, count in counts.items()})
    assert float(total) == pytest.approx(float(sums["dpo"]) / 5 - 0.25 * mean(chosen), rel=1e-6)


def test_without_sft_weight_there_is_no_sft_term(models, pairs):
    assert "sft" not in task_of(models).training_step(*_step(models, pairs))


def test_tokens_of_both_responses_are_counted(models, pairs, written_out):
    task = task_of(models, sft_weight=0.25)
    counts = {name: float(count) for name, count in task.counts(pairs.collate(pairs.train)).items()}
    assert task.tokens(counts) == sum(len(side) for policy, _ in written_out for side in policy)


# -- invalid pairs -------------------------------------------------------------------------------------------------------


def gradient(task, batch):
    model = task.model
    model.zero_grad()
    task.training_step(model, batch)["dpo"].backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_a_pair_without_targets_contributes_nothing(loss_type, models, pairs):
    task = task_of(models, loss_type=loss_type, length_normalised=True)
    whole, others = pairs.collate(pairs.train), pairs.collate([pair for pair in pairs.train if pair[0] != EMPTY])
    both = [{name: float(value) for name, value in task.training_step(models[0], batch).items()} for batch in (whole, others)]
    assert both[0] == pytest.approx(both[1], rel=1e-5)
    for one, other in zip(gradient(task, whole).values(), gradient(task, others).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_pair_with_one_truncated_response_does_not_count(models, pairs):
    batch = pairs.collate(pairs.train[:1])
    batch["labels"][1] = IGNORE_INDEX
    task = task_of(models, sft_weight=1.0)
    assert {name: int(count) for name, count in task.counts(batch).items()} == {"dpo": 0, "sft": 0, "tokens": 0}
    assert not any(float(value) for value in task.training_step(models[0], batch).values())


def test_a_batch_without_targets_has_zero_gradients(models, pairs):
    batch = pairs.without_targets(pairs.collate(pairs.train))
    task = task_of(models, length_normalised=True)
    columns = {"train/index": torch.tensor([99]), "train/logps": torch.zeros(1, 2)}
    task.reference_model = CachedReference(columns)  # which knows none of these pairs
    assert not any(grad.any() for grad in gradient(task, batch).values())
    assert all(float(value) == 0 for value in task.training_step(models[0], batch).values())


# -- what must not matter ------------------------------------------------------------------------------------------------


def test_padding_and_other_pairs_do_not_matter(models, pairs):
    task = task_of(models, ld_alpha=0.5)
    whole = task.training_step(models[0], pairs.collate(pairs.train))
    alone = [task.training_step(models[0], pairs.collate([pair])) for pair in pairs.train]
    for name, value in whole.items():
        assert sum(float(sums[name]) for sums in alone) == pytest.approx(float(value), rel=1e-5, abs=1e-6), name


@torch.no_grad()
def test_validation_metrics_are_means_of_training_metrics(models, pairs):
    task = task_of(models, sft_weight=0.5)
    batch = pairs.collate(pairs.train)
    sums = {name: float(value) for name, value in task.training_step(models[0], batch).items()}
    added: dict[str, float] = {}
    for pair in pairs.train:
        for name, value in task.validation_step(models[0], pairs.collate([pair])).items():
            added[name] = added.get(name, 0.0) + float(value)
    metrics = task.validation_metrics(added)
    assert metrics["validation_loss"] == pytest.approx(sums["dpo"] / 5 + 0.5 * sums["sft"] / float(task.counts(batch)["sft"]))
    for name in ("rewards/accuracies", "rewards/margins"):
        assert metrics[f"validation_{name}"] == pytest.approx(sums[name] / 5, rel=1e-5)


def test_losses_of_extreme_margins_are_finite(models):
    """-log sigmoid(-1e6) is 1e6, not infinity."""
    losses = DPO(models[0], pref_beta=1.0, dpo_label_smoothing=0.1).pair_loss(torch.tensor([-1e6, 1e6]))
    assert losses.tolist() == pytest.approx([0.9e6, 0.1e6])


def test_a_pair_missing_from_the_cache_is_nan(models, pairs):
    columns = {"train/index": torch.tensor([0, 1, 5]), "train/logps": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])}
    found = CachedReference(columns)(None, {"index": torch.tensor([5, 0, 3, 9])}, "train")
    assert found[:2].tolist() == [[5.0, 6.0], [1.0, 2.0]]
    assert found[2:].isnan().all()


# -- refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pref_beta": 0.0}, "pref_beta must be more than 0, got 0.0"),
        ({"loss_type": "kto"}, "loss_type must be sigmoid, ipo, hinge or robust, got 'kto'"),
        ({"dpo_label_smoothing": 0.5}, "dpo_label_smoothing must be in [0, 0.5), got 0.5"),
        (
            {"dpo_label_smoothing": 0.1, "loss_type": "ipo"},
            "dpo_label_smoothing works with loss_type sigmoid and robust only",
        ),
        ({"sft_weight": -1.0}, "sft_weight must be at least 0, got -1.0"),
        ({"ld_alpha": 1.5}, "ld_alpha must be in [0, 1], got 1.5"),
        ({"reference": "runs/nowhere"}, "folder not found: runs/nowhere"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message, models):
    with pytest.raises(ValueError) as refused:
        DPO(models[0], **options)
    assert message in str(refused.value)


def test_adapters_off_without_adapters_is_refused(models, pairs):
    with pytest.raises(ValueError, match="adapters_off needs adapters: add bumblebee.lora.LoRA"):
        DPO(models[0], reference="adapters_off").setup(pairs)


def test_copy_as_reference_is_refused_outside_of_a_run(models, pairs):
    task = DPO(models[0])
    task.setup(pairs)
    with pytest.raises(ValueError, match="reference: copy works in a training run only; to validate, set the folder"):
        task.begin_validation(torch.device("cpu"))


def test_data_without_pairs_is_refused(models):
    data = Rows()
    data.setup(0)
    with pytest.raises(ValueError, match="DPO needs pairs of responses.*Rows has none"):
        DPO(models[0]).setup(data)


def test_precomputing_without_pair_indices_is_refused(models, pairs, monkeypatch):
    whole = pairs.collate
    monkeypatch.setattr(pairs, "collate", lambda samples: {k: v for k, v in whole(samples).items() if k != "index"})
    with pytest.raises(ValueError, match="precompute_reference needs batches with the pairs' index"):
        DPO(models[0], precompute_reference=True).setup(pairs)
