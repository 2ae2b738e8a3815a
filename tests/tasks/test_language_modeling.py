"""Sums and counts of language modelling, and its validation metrics."""

from __future__ import annotations

import math

import pytest
import torch

from bumblebee.datamodule import DataModule
from bumblebee.model import Bumblebee
from bumblebee.nn import IGNORE_INDEX
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.tasks.task import Task
from bumblebee.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(tiny):
    torch.manual_seed(0)
    return Bumblebee(tiny()).eval()


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(1)
    tokens = torch.randint(0, 400, (3, 13))
    labels = tokens[:, 1:].clone()
    labels[0, :9] = IGNORE_INDEX
    labels[2] = IGNORE_INDEX
    return {"input_ids": tokens[:, :-1], "labels": labels, "position_ids": torch.arange(12).expand(3, 12)}


def naive_losses(model, batch):
    """-log p of each target, one by one, from the logits."""
    log_probs = model(batch["input_ids"], batch["position_ids"]).double().log_softmax(-1)
    positions = [(row, at) for row in range(3) for at in range(12) if batch["labels"][row, at] != IGNORE_INDEX]
    return torch.stack([-log_probs[row, at, batch["labels"][row, at]] for row, at in positions])


def test_counts_are_targets_and_loss_is_their_sum(model, batch):
    task = LanguageModeling(model)
    losses = naive_losses(model, batch)
    assert task.counts(batch) == {"loss": len(losses)} == {"loss": 15}
    torch.testing.assert_close(task.training_step(model, batch)["loss"].double(), losses.sum(), rtol=1e-6, atol=0)


def test_a_batch_without_targets_has_zero_loss_and_gradients(model, batch):
    empty = {**batch, "labels": torch.full_like(batch["labels"], IGNORE_INDEX)}
    loss = LanguageModeling(model).training_step(model, empty)["loss"]
    assert loss.item() == 0.0
    model.zero_grad()
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@torch.no_grad()
def test_splitting_a_batch_changes_neither_sums_nor_metrics(model, batch):
    task = LanguageModeling(model)
    whole = task.validation_step(model, batch)
    rows = [task.validation_step(model, {name: t[row : row + 1] for name, t in batch.items()}) for row in range(3)]
    added = {name: sum(float(row[name]) for row in rows) for name in whole}
    for name, value in whole.items():
        assert math.isclose(added[name], float(value), rel_tol=1e-6)


class Data(DataModule):
    """Only a tokenizer."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def setup(self, seed):
        """Nothing."""

    def collate(self, samples):
        return {}


@torch.no_grad()
def test_bits_per_byte_counts_the_bytes_of_the_targets_text(model, batch, tokenizer_folder):
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    task = LanguageModeling(model)
    task.setup(Data(tokenizer))
    text = "Bytes: ä, €, \U0001f41d!"
    ids = tokenizer.encode("x" + text)
    tokens = torch.tensor([[*ids, tokenizer.eos_token_id]])
    labels = tokens[:, 1:].clone()
    one = {"input_ids": tokens[:, :-1], "labels": labels, "position_ids": torch.arange(len(ids))[None]}
    sums = {name: float(value) for name, value in task.validation_step(model, one).items()}
    assert sums["bytes"] == len(text.encode())  # the end of the text has none
    assert sums["targets"] == len(ids)
    metrics = task.validation_metrics(sums)
    assert metrics["validation_loss"] == sums["loss"] / sums["targets"]
    assert math.isclose(metrics["validation_perplexity"], math.exp(metrics["validation_loss"]))
    assert math.isclose(metrics["validation_bits_per_byte"], sums["loss"] / math.log(2) / len(text.encode()))


def test_no_targets_give_a_loss_of_zero(model):
    assert LanguageModeling(model).validation_metrics({"loss": 0.0, "targets": 0.0})["validation_loss"] == 0.0


def test_perplexity_of_a_huge_loss_is_finite(model):
    metrics = LanguageModeling(model).validation_metrics({"loss": 5000.0, "targets": 1.0})
    assert metrics["validation_loss"] == 5000.0 and math.isfinite(metrics["validation_perplexity"])


def test_perplexity_in_training_is_that_of_the_token_loss(model):
    task = LanguageModeling(model)
    assert task.derived_metrics({"loss": 2.0, "router": 5.0}) == {"perplexity": math.exp(2.0)}
    assert task.derived_metrics({"router": 5.0}) == {}
    assert torch.tensor(task.derived_metrics({"loss": 5000.0})["perplexity"], dtype=torch.float32).isfinite()


def test_a_tokenizer_with_too_many_ids_is_refused(tiny, tokenizer_folder):
    task = LanguageModeling(Bumblebee(tiny(vocab_size=399)))
    with pytest.raises(ValueError, match="400.*399"):
        task.setup(Data(Tokenizer.from_pretrained(tokenizer_folder)))


class TwoTerms(LanguageModeling):
    """A second term with a count and a weight of its own."""

    def __init__(self, model):
        super().__init__(model)
        self.weights = {"loss": 1.0, "extra": 0.5}


def test_each_term_is_divided_by_its_own_count(model):
    task: Task = TwoTerms(model)
    losses = {"loss": torch.tensor(6.0), "extra": torch.tensor(8.0)}
    assert task.total(losses, {"loss": 3, "extra": 4}).item() == 6 / 3 + 0.5 * 8 / 4
    assert task.total({"loss": torch.tensor(6.0), "extra": torch.tensor(0.0)}, {"loss": 3, "extra": 0}).item() == 2.0
