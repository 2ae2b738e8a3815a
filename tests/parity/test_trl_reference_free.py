"""Parity with TRL's CPOTrainer (also its SimPO) and ORPOTrainer: same pairs, same loss and gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.training_runs import Pairs, small_model

from bumblebee import CPO, ORPO, SimPO

cpo = pytest.importorskip("trl.experimental.cpo")
orpo = pytest.importorskip("trl.experimental.orpo")

DEFAULTS = {"alpha": 0.0, "cpo_alpha": 1.0, "simpo_gamma": 0.0, "label_smoothing": 0.0, "loss_type": "sigmoid", "beta": 0.1}
CASES = {  # our task; TRL's settings
    "cpo": (lambda model: CPO(model), {}),
    "cpo smoothed": (
        lambda model: CPO(model, pref_beta=0.5, label_smoothing=0.2, sft_weight=0.3),
        {"beta": 0.5, "label_smoothing": 0.2, "cpo_alpha": 0.3},
    ),
    "simpo": (
        lambda model: SimPO(model, pref_beta=2.5, margin=1.4),
        {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.4, "cpo_alpha": 0.0},
    ),
    "orpo": (lambda model: ORPO(model, pref_beta=0.25), {"beta": 0.25}),
}


@pytest.fixture(scope="module")
def pairs():
    data = Pairs(6)
    data.setup(0)
    return data


@pytest.fixture
def theirs(tmp_path):
    from transformers import AutoModelForCausalLM

    small_model(0).save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)


def trainer_of(kind, settings):
    """A trainer with what its loss reads, since its constructor asks for data to tokenize."""
    trainer = object.__new__(kind)
    fixed = {"is_encoder_decoder": False, "aux_loss_enabled": False, "pad_token_id": 0, "padding_value": 0}
    for name, value in {**DEFAULTS, **fixed, **settings}.items():
        setattr(trainer, name, value)
    gather = {"gather_for_metrics": lambda value: value, "device": torch.device("cpu")}
    trainer.accelerator = SimpleNamespace(**gather)
    return trainer


def trl_batch(pairs):
    batch = {}
    for side, name in enumerate(("chosen", "rejected")):
        rows = [(prompt, both[side]) for _, prompt, both in pairs.train]
        shape = len(rows), max(len(row) for _, row in rows)
        ids, mask, labels = (torch.full(shape, value) for value in (0, 0, -100))
        for index, (prompt, row) in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)], labels[index, prompt : len(row)] = row, 1, row[prompt:]
        batch |= {f"{name}_input_ids": ids, f"{name}_attention_mask": mask, f"{name}_labels": labels}
    return batch


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_trl(name, pairs, theirs):
    make, settings = CASES[name]
    trainer = trainer_of(orpo.ORPOTrainer if name == "orpo" else cpo.CPOTrainer, settings)
    if name == "orpo":  # without the language-modelling loss, which TRL extends to the prompt and the paper does not
        chosen, rejected, *_ = trainer.concatenated_forward(theirs, trl_batch(pairs))
        trl_loss = -trainer.odds_ratio_loss(chosen, rejected)[0].mean()
    else:
        trl_loss, _ = trainer.get_batch_loss_metrics(theirs, trl_batch(pairs))
    trl_loss.backward()

    ours = small_model(0)
    task = make(ours)
    if name == "orpo":
        task.weights["sft"] = 0.0
    batch = pairs.collate(pairs.train)
    loss = task.total(task.training_step(ours, batch), {key: float(count) for key, count in task.counts(batch).items()})
    loss.backward()
    torch.testing.assert_close(loss, trl_loss, rtol=1e-5, atol=1e-6)
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key].grad, rtol=1e-4, atol=1e-6)
