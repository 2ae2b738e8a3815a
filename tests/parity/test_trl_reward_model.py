"""Parity of reward models with TRL's RewardTrainer, and of their folders with transformers and PEFT."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training_runs import Pairs, small_model, train, weights

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoModelForSequenceClassification  # noqa: E402

from bumblebee import Bumblebee, RewardModel  # noqa: E402
from bumblebee.checkpoint.consolidate import consolidate  # noqa: E402
from bumblebee.checkpoint.merge import merge  # noqa: E402
from bumblebee.lora import logit_differences  # noqa: E402
from bumblebee.models.loading import load_model  # noqa: E402
from bumblebee.tasks.reward_model import response_scores  # noqa: E402

PAIRS = ("Pairs", {"samples": 6})


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    """Pairs without the ids 0 and 63, which are padding: transformers' embeddings have no gradient there."""
    data = Pairs(6)
    data.setup(0)
    data.train = [(index, prompt, [row.clamp(1, 62) for row in rows]) for index, prompt, rows in data.train]
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reward model with random weights."""
    folder = tmp_path_factory.mktemp("reward_model")
    model = small_model(0)
    model.become_reward_model()
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("margin", "center"), [(False, 0.0), (True, 0.0), (True, 0.1)])
def test_loss_gradients_and_metrics_equal_trl(
    margin: bool, center: float, pairs: Pairs, folder: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    logging.getLogger("trl").setLevel(logging.ERROR)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # our Trainer sets these; accelerate would then require more
        monkeypatch.delenv(name, raising=False)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_folder / "tokenizer.json"), pad_token=end, eos_token=end)
    options = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
    trainer = trl.RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=1),
        args=trl.RewardConfig(output_dir=str(folder / "out"), center_rewards_coefficient=center or None, **options),
        processing_class=tokenizer, train_dataset=Dataset.from_list([{"chosen": "a", "rejected": "b"}]),
    )  # fmt: skip
    pad = tokenizer.pad_token_id
    margins = torch.linspace(-0.5, 2, len(pairs.train))
    assert trainer.model.config.pad_token_id == pad
    rows = [
        {"chosen_ids": chosen.tolist(), "rejected_ids": rejected.tolist(), **({"margin": float(each)} if margin else {})}
        for (_, _, (chosen, rejected)), each in zip(pairs.train, margins, strict=True)
    ]
    trainer.model.train()
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    expected.backward()

    model = Bumblebee.from_pretrained(folder)
    task = RewardModel(model, center_rewards_coefficient=center)
    batch = {**pairs.collate(pairs.train), **({"margin": margins} if margin else {})}
    counts = {name: float(count) for name, count in task.counts(batch).items()}
    sums = task.training_step(model, batch)
    loss = task.total(sums, counts)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    gradients = dict(trainer.model.named_parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key].grad, rtol=1e-4, atol=1e-6)
    for ours, theirs in (("accuracies", "accuracy"), ("margins", "margin")):
        value = float(sums[f"rewards/{ours}"]) / counts["reward_model"]
        assert value == pytest.approx(trainer._metrics["train"][theirs][-1], rel=1e-4, abs=1e-6)


def scores(folder: Path, pairs: Pairs) -> torch.Tensor:
    """The scores that our model of a folder computes."""
    with torch.no_grad():
        return response_scores(load_model(folder).eval(), pairs.collate(pairs.train))


def scores_of(model: Any, pairs: Pairs) -> torch.Tensor:
    """The scores of a transformers model, of all responses in one padded batch."""
    rows = [row for _, _, pair in pairs.train for row in pair]
    pad = model.config.pad_token_id
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    with torch.no_grad():
        return model.eval()(ids, attention_mask=mask).logits.flatten()


SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Llama": {"attention_bias": False, "tie_word_embeddings": False},
    "Qwen3": {"qk_norm": True, "attention_bias": False},
    "Mistral": {"attention_bias": False, "sliding_window": 6},
    "Glm4": {"post_norms": True, "rope_interleaved": True, "partial_rotary_factor": 0.5, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("family", SHAPES)
def test_a_folder_scores_alike_in_transformers_and_back(family: str, pairs: Pairs, tmp_path: Path) -> None:
    model = small_model(0, **SHAPES[family])
    model.become_reward_model()
    model.config.pad_token_id = 63
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(tmp_path)
    hf = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert (type(hf).__name__, hf.config.num_labels) == (f"{family}ForSequenceClassification", 1)
    expected = scores_of(hf, pairs)
    torch.testing.assert_close(scores(tmp_path, pairs), expected, rtol=1e-5, atol=1e-5)
    hf.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(scores(tmp_path / "theirs", pairs), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("lora", [False, True])
def test_folders_of_a_run_score_alike_everywhere(lora: bool, stage: int, pairs: Pairs, tmp_path: Path) -> None:
    base = small_model(0)
    base.config.pad_token_id = 63
    base.save_pretrained(tmp_path / "base")
    job: dict[str, Any] = {"lora": {"rank": 4, "alpha": 32, "dropout": 0.0}} if lora else {}
    save = {"checkpoint": ("Checkpoint", {"every": 2, "keep": None})}
    run = tmp_path / "run"
    lines = train(
        run, task="RewardModel", data=PAIRS, base=str(tmp_path / "base"), zero_stage=stage, max_steps=4, callbacks=save, **job
    )
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["rewards/accuracies"] > 0.5
    consolidate(run / "checkpoint-4", tmp_path / "again")
    expected = scores(run, pairs)
    assert expected.std() > 0.05
    folders = [run / "checkpoint-4", tmp_path / "again"]
    if lora:
        from peft import AutoPeftModelForSequenceClassification

        merge(run, tmp_path / "merged")
        folders.append(tmp_path / "merged")
        for difference, largest in logit_differences(tmp_path / "merged", run).values():
            assert difference < 1e-5 < largest
        adapted = AutoPeftModelForSequenceClassification.from_pretrained(run, num_labels=1)
        torch.testing.assert_close(scores_of(adapted, pairs), expected, rtol=1e-4, atol=1e-5)
    for folder in folders:
        torch.testing.assert_close(scores(folder, pairs), expected, rtol=1e-5, atol=1e-6)
    whole = tmp_path / "merged" if lora else run
    hf = AutoModelForSequenceClassification.from_pretrained(whole)
    torch.testing.assert_close(scores_of(hf, pairs), expected, rtol=1e-4, atol=1e-5)
    assert "lm_head.weight" not in weights(whole)
