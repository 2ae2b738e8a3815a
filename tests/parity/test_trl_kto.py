"""Parity with TRL's KTOTrainer: same examples and mismatched answers, same loss, gradients and metrics."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training_runs import Labelled, Pairs, small_model
from torch import nn

from bumblebee import KTO, RewardModel
from bumblebee.tasks.reference import FrozenReference

os.environ["HF_HUB_OFFLINE"] = "1"

trl = pytest.importorskip("trl")

OPTIONS: dict[str, dict[str, Any]] = {  # ours; TRL's have the same names, but for beta
    "kto": {},
    "weighted": {"pref_beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.7},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "pref_beta": 0.3},
}


class Run:
    """What KTO uses of a run."""

    def __init__(self, model: nn.Module) -> None:
        self.engine = model

    @staticmethod
    def to_device(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return batch


@pytest.fixture(scope="module")
def data() -> Labelled:
    data = Labelled(8)
    data.setup(0)
    return data


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_gradients_and_metrics_equal_trl(
    name: str, data: Labelled, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    logging.getLogger("trl").setLevel(logging.ERROR)
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # our Trainer sets these; accelerate would then require more
        monkeypatch.delenv(variable, raising=False)
    # The seeds give a z0 above 0.
    policy, reference = small_model(0), small_model(3)
    for seed, model in (("policy", policy), ("reference", reference)):
        model.save_pretrained(tmp_path / seed)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / each, dtype=torch.float32) for each in ("policy", "reference")]
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_folder / "tokenizer.json"), pad_token=end, eos_token=end)
    settings = {{"pref_beta": "beta"}.get(key, key): value for key, value in OPTIONS[name].items()}
    options = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
    trainer = trl.KTOTrainer(
        model=models[0], ref_model=models[1],
        args=trl.KTOConfig(output_dir=str(tmp_path / "out"), per_device_train_batch_size=8, **options, **settings),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "a", "completion": "b", "label": each} for each in (True, False)]),
    )  # fmt: skip
    answers = [own[at:].tolist() for _, at, (own, _) in data.train]
    rows = [
        {
            "prompt_ids": own[:at].tolist(),
            "completion_ids": answers[number],
            "KL_completion_ids": answers[number - 1],
            "label": number % 3 > 0,
        }
        for number, (_, at, (own, _)) in enumerate(data.train)
    ]
    trainer.model.train()
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    expected.backward()

    task = KTO(policy, **OPTIONS[name])
    task.reference_model = FrozenReference(reference.eval().requires_grad_(False))
    task._run = Run(policy)  # type: ignore[assignment]
    ((batch,),) = task.prepare_windows([[data.collate(data.train)]], 0)
    counts = {key: float(count) for key, count in task.counts(batch).items()}
    sums = task.training_step(policy, batch)
    loss = task.total(sums, counts)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    gradients = dict(trainer.model.named_parameters())
    for key, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key].grad, rtol=1e-4, atol=1e-6)
    means = {key: float(sums[key]) / counts[unit] for key, unit in task.units.items()}
    means |= task.derived_metrics(means)
    for key in set(means) - {"rewards/accuracies"}:
        assert means[key] == pytest.approx(trainer._metrics["train"][key][-1], rel=1e-4, abs=1e-6), key
    assert name.startswith("apo") or means["kl"] > 0.01


def test_the_data_of_another_loss_is_refused() -> None:
    labelled, pairs = Labelled(4), Pairs(4)
    for each in (labelled, pairs):
        each.setup(0)
    with pytest.raises(
        ValueError, match="RewardModel needs pairs of responses, as from datamodules.Preferences; Labelled has none"
    ):
        RewardModel(small_model(0)).setup(labelled)
    with pytest.raises(ValueError, match="KTO needs labelled answers, as from datamodules.UnpairedPreferences; Pairs has none"):
        KTO(small_model(0)).setup(pairs)
