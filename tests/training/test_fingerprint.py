"""A resume has the data, the model, the optimizer and the frozen weights of the run that wrote the checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.recipe_files import SAMPLES
from helpers.training_runs import small_model, train

from bumblebee.distributed.deepspeed.zero_shards import algorithm_of
from datamodules import SFT, Preferences, Pretrain
from datamodules.token_cache import arrays_digest

SAVE = {"checkpoint": ("Checkpoint", {})}
CHATS = Path(__file__).parents[1] / "golden" / "chats.jsonl"
Fingerprint = Callable[..., dict[str, str]]


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


# -- data ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fingerprint(tokenizer_folder: Path, tmp_path: Path) -> Fingerprint:
    """The fingerprint of texts in a file."""

    def of(texts: list[str], file: str = "a.jsonl", **options: Any) -> dict[str, str]:
        (tmp_path / file).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        data = Pretrain(str(tmp_path / file), str(tokenizer_folder), **{"max_length": 64, **options})
        data.setup(0)
        return data.fingerprint()

    return of


def test_data_fingerprint_changes_with_what_is_trained_on(fingerprint: Fingerprint) -> None:
    texts = ["One text.", "Another one.", "A third, longer text.", "The last."]
    before = fingerprint(texts)
    assert changed(before, fingerprint(texts, "moved.jsonl")) == set()
    assert changed(before, fingerprint(["".join(texts[:1]), texts[2], texts[1], texts[3]])) == {"records", "tokens", "samples"}
    assert "records" in changed(before, fingerprint([*texts[:3], "The lost."]))
    assert changed(before, fingerprint(texts, max_length=12)) == {"samples"}
    half = fingerprint(texts, validation_ratio=0.5)
    assert "records" in changed(before, half)
    assert changed(half, fingerprint(texts, validation_ratio=0.5)) == set()


def test_data_fingerprint_of_conversations_and_pairs(tokenizer_folder: Path) -> None:
    def of(kind: type[SFT | Preferences], file: Path, **options: Any) -> dict[str, str]:
        data = kind(str(file), str(tokenizer_folder), **{"max_length": 512, **options})
        data.setup(0)
        return data.fingerprint()

    chats = of(SFT, CHATS)
    assert "tokens" in changed(chats, of(SFT, CHATS, system="Be brief."))
    assert "tokens" in changed(chats, of(SFT, CHATS, train_on="last"))
    assert changed(chats, of(SFT, CHATS, packing=False)) == {"samples"}
    file = next(SAMPLES.glob("preferen*"))
    assert changed(of(Preferences, file), of(Preferences, file, max_length=1024)) <= {"samples"}


def test_digest_of_arrays_ignores_the_dtype() -> None:
    assert arrays_digest(np.arange(3, dtype=np.int32)) == arrays_digest(np.arange(3, dtype=np.int64))
    assert arrays_digest(np.arange(3), np.arange(3)) != arrays_digest(np.arange(6) % 3)


# -- optimizer -------------------------------------------------------------------------------------------------------------


def test_algorithm_is_that_of_torch_and_independent_of_speed() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    adam, adamw = torch.optim.Adam, torch.optim.AdamW
    assert (
        algorithm_of(adamw(parameters, lr=0.1, foreach=False)) == algorithm_of(adamw(parameters, weight_decay=0.0)) == "AdamW"
    )
    assert algorithm_of(adam(parameters)) == "Adam" != algorithm_of(adam(parameters, decoupled_weight_decay=True))
    assert algorithm_of(adam(parameters, amsgrad=True)) == "Adam with amsgrad"


# -- runs ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on conversations."""
    folder = tmp_path_factory.mktemp("run")
    train(folder / "run", data=("Chats", {"file": str(CHATS)}), max_steps=2, callbacks=SAVE, model={"vocab_size": 400})
    return folder / "run"


def resume(run: Path, folder: Path, **job: Any) -> None:
    job = {"data": ("Chats", {"file": str(CHATS)}), "model": {}, "max_steps": 3, **job}
    train(folder, resume=str(run / "checkpoint-2"), **{**job, "model": {"vocab_size": 400, **job["model"]}})


@pytest.mark.slow
def test_resume_refuses_what_is_not_that_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "reversed.jsonl").write_text("".join(reversed(CHATS.read_text().splitlines(keepends=True))))
    refused: list[tuple[str, dict[str, Any]]] = [
        ("data whose records have the digest .*: use the data of that run \\(data.files", {
            "data": ("Chats", {"file": str(tmp_path / "reversed.jsonl")})
        }),
        ("num_attention_heads 4, this run has 2: set it back, or", {
            "model": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
        }),
        ("rope_theta 10000.0, this run has 500000.0: set it back", {"model": {"rope_theta": 500000.0}}),
        ("optimizer AdamW, this run has Adam: set it back", {"optimizer": ("Adam", {"lr": 1e-3})}),
    ]  # fmt: skip
    for said, job in refused:
        with pytest.raises(ValueError, match=f"trainer.resume: {run}/checkpoint-2 was trained with {said}"):
            resume(run, tmp_path / "then", **job)
    assert not (tmp_path / "then").exists()


@pytest.mark.slow
def test_resume_accepts_what_a_run_may_change(run: Path, tmp_path: Path) -> None:
    resume(
        run,
        tmp_path / "then",
        optimizer=("AdamW", {"lr": 1e-4, "weight_decay": 0.5, "betas": (0.8, 0.9)}),
        schedule=("Cosine", {"warmup_ratio": 0.0}),
        groups=[],
        model={"attention_dropout": 0.1, "eos_token_id": 3},
        micro_batch_size=3,
        accumulate=1,
        precision="bf16",
        zero_stage=2,
        gradient_clip=0.5,
        callbacks={},
    )
    assert (tmp_path / "then" / "model.safetensors").is_file()


@pytest.mark.slow
def test_checkpoint_of_an_earlier_version_resumes(run: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(run, tmp_path / "old")) / "checkpoint-2"
    state = json.loads((old / "trainer_state.json").read_text())
    assert set(state.pop("fingerprint")) == {"data", "model", "optimizer", "weights"}
    (old / "trainer_state.json").write_text(json.dumps(state))
    (old / "SHA256SUMS").unlink()
    resume(old.parent, tmp_path / "then", model={"rope_theta": 500000.0})
    assert (tmp_path / "then" / "model.safetensors").is_file()


@pytest.mark.slow
def test_resume_refuses_other_frozen_weights(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "base")
    job: dict[str, Any] = {"base": str(tmp_path / "base"), "callbacks": SAVE}
    kinds: dict[str, dict[str, Any]] = {"lora": {"lora": {"rank": 4}}, "frozen": {"task": "PartlyFrozen"}}
    for name, options in kinds.items():
        train(tmp_path / name, max_steps=2, **job, **options)
    small_model(seed=1).save_pretrained(tmp_path / "base")
    for name, options in kinds.items():
        said = f"{name}/checkpoint-2 was trained with base model's model.safetensors of SHA-256 .*: restore that file, or"
        with pytest.raises(ValueError, match=said):
            train(tmp_path / name, resume="auto", max_steps=3, **job, **options)
