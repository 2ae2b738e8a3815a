"""``bumblebee.rewards.RewardModel`` against transformers, and in a GRPO run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training_runs import SMALL, Questions, small_model

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoModelForSequenceClassification  # noqa: E402

from bumblebee import GRPO, Tokenizer, Trainer  # noqa: E402
from bumblebee.models.loading import load_model  # noqa: E402
from bumblebee.preview.memory_estimate import ModelSize  # noqa: E402
from bumblebee.rewards import RewardInput, RewardModel  # noqa: E402
from bumblebee.rl.scoring import WeightedRewards  # noqa: E402
from bumblebee.training.fingerprint import model_fingerprint  # noqa: E402

CHATS = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "More!"},
    ],
    [{"role": "user", "content": "a"}],
]
ANSWERS = ["Because of <|im_end|> it. ", "", "Green, blue and yellow."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A reward model that transformers has saved, with a tokenizer."""
    folder = tmp_path_factory.mktemp("reward_model")
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    model = small_model(0, vocab_size=tokenizer.vocab_size, max_position_embeddings=512)
    model.become_reward_model()
    model.config.pad_token_id = 0
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(folder / "ours")
    AutoModelForSequenceClassification.from_pretrained(folder / "ours").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("at", ["end_of_turn", "end_of_text"])
def test_scores_are_those_of_transformers(at: Any, folder: Path) -> None:
    template = Tokenizer.from_pretrained(folder).chat_template
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = []
    for chat, answer in zip(CHATS, ANSWERS, strict=True):
        ids = template.apply([*chat, {"role": "assistant", "content": answer}])
        ids = ids if at == "end_of_text" else ids[: len(ids) - ids[::-1].index(template.end_of_turn_id)]
        with torch.no_grad():
            expected.append(float(model(torch.tensor([ids])).logits))
    inputs = [RewardInput("", text, {}, messages=chat) for chat, text in zip(CHATS, ANSWERS, strict=True)]
    for batch_size in (1, 16):
        reward = RewardModel(str(folder), batch_size=batch_size, at=at)
        assert reward.score(inputs) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert max(expected) - min(expected) > 0.1


def test_a_completion_without_its_conversation_answers_the_question(folder: Path) -> None:
    reward = RewardModel(str(folder))
    (alone,), whole = reward(["a"], ["b"], [{}]), reward.score([RewardInput("", "b", {}, messages=CHATS[2])])
    assert [alone] == pytest.approx(whole)
    assert alone != pytest.approx(reward(["c"], ["b"], [{}])[0], abs=1e-3)


def test_other_folders_and_long_completions_are_refused(folder: Path, tmp_path: Path) -> None:
    small_model(0).save_pretrained(tmp_path / "model")
    for name, message in ((tmp_path / "model", "does not hold a reward model"), ("nowhere", "folder not found: nowhere")):
        with pytest.raises(ValueError, match=f"task.rewards: RewardModel: .*{message}"):
            WeightedRewards([RewardModel(str(name))], None).check()
    with pytest.raises(ValueError, match=r"cannot read a completion: \d+ tokens, the model has 512 positions"):
        RewardModel(str(folder))(["a"], ["b " * 600], [{}])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_grpo_is_rewarded_by_a_reward_model(stage: int, folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(**{**SMALL, "zero_stage": stage, "max_steps": 1})
    with trainer.building():
        reward = RewardModel(str(folder))
        task = GRPO(small_model(0, vocab_size=300), [reward], group_size=4, max_new_tokens=4)
    trainer.fit(task, Questions(6), lambda groups: torch.optim.AdamW(groups, lr=1e-2), output_dir=tmp_path)
    (file,) = (tmp_path / "rollouts").glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    again = RewardModel(str(folder))(
        [line["prompt"] for line in lines], [line["completion"] for line in lines], [{}] * len(lines)
    )
    assert [line["RewardModel"] for line in lines] == pytest.approx(again, rel=1e-4, abs=1e-5)
    assert len(set(again)) > 4


def test_a_run_counts_and_fingerprints_the_reward_model(folder: Path) -> None:
    task = GRPO(small_model(0), [RewardModel(str(folder))])
    (model,) = task.frozen_models()
    assert ModelSize.of(model).parameters == sum(p.numel() for p in load_model(str(folder)).parameters())
    digests = model_fingerprint(task)["weights"]
    assert list(digests) == ["RewardModel's model.safetensors"]
