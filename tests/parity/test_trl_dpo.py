"""Parity with TRL's DPOTrainer: same pairs, same loss, gradients and metrics."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest
import torch
from helpers.training_runs import Pairs, small_model

from bumblebee.tasks.dpo import DPO
from bumblebee.tasks.reference import FrozenReference

os.environ["HF_HUB_OFFLINE"] = "1"

trl = pytest.importorskip("trl")

OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # our options, TRL's
    "sigmoid": ({}, {"loss_types": ["sigmoid"]}),
    "another beta": ({"pref_beta": 0.5}, {"loss_types": ["sigmoid"], "beta": 0.5}),
    "hinge": ({"loss_type": "hinge"}, {"loss_types": ["hinge"]}),
    "robust": ({"loss_type": "robust", "dpo_label_smoothing": 0.2}, {"loss_types": ["robust"], "label_smoothing": 0.2}),
    "ipo by the mean": ({"loss_type": "ipo", "length_normalised": True}, {"loss_types": ["ipo"]}),
    "sigmoid by the mean": ({"length_normalised": True}, {"loss_types": ["sigmoid_norm"]}),
    "with sft": ({"sft_weight": 0.3}, {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
}


@pytest.fixture(scope="module")
def pairs():
    data = Pairs(6)
    data.setup(0)
    return data


@pytest.fixture(scope="module")
def patches():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, tokenizer_folder, patches):
    """A DPOTrainer whose policy and reference are two small models."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    logging.getLogger("trl").setLevel(logging.ERROR)
    folder = tmp_path_factory.mktemp("trl")
    for seed, name in enumerate(("policy", "reference")):
        small_model(seed).save_pretrained(folder / name)
    models = [AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in ("policy", "reference")]
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_folder / "tokenizer.json"), pad_token=end, eos_token=end)
    options = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # our Trainer sets these; accelerate would then require more
        patches.delenv(name, raising=False)
    return trl.DPOTrainer(
        model=models[0], ref_model=models[1], args=trl.DPOConfig(output_dir=str(folder / "out"), **options),
        processing_class=tokenizer, train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
    )  # fmt: skip


def trl_batch(trainer, pairs):
    ids = [{"prompt_ids": chosen[:at].tolist(), "chosen_ids": chosen[at:].tolist(), "rejected_ids": rejected[at:].tolist()}
           for _, at, (chosen, rejected) in pairs.train]  # fmt: skip
    return trainer.data_collator(ids)


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_gradients_and_metrics_equal_trl(name, pairs, trainer, monkeypatch):
    options, settings = OPTIONS[name]
    for key, value in {"loss_weights": [1.0], **settings}.items():
        monkeypatch.setattr(trainer, key, value)
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer.model.train()
    trl_loss = trainer.compute_loss(trainer.model, trl_batch(trainer, pairs))
    trl_loss.backward()

    policy = small_model(0)
    task = DPO(policy, **options)
    task.reference_model = FrozenReference(small_model(1).eval().requires_grad_(False))
    batch = pairs.collate(pairs.train)
    counts = {name: float(count) for name, count in task.counts(batch).items()}
    sums = task.training_step(policy, batch)
    loss = task.total(sums, counts)
    loss.backward()

    torch.testing.assert_close(loss, trl_loss, rtol=1e-5, atol=1e-6)
    expected = dict(trainer.model.named_parameters())
    for key, parameter in policy.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[key].grad, rtol=1e-4, atol=1e-6, msg=lambda text, k=key: f"{k} {text}"
        )
    for key in set(task.units) - {"logps/accuracies"}:  # TRL has no such metric
        assert float(sums[key]) / counts["dpo"] == pytest.approx(trainer._metrics["train"][key][-1], rel=1e-4, abs=1e-6), key
