"""LoRA runs match a reference loop with PEFT, save only adapters, and resume byte-identically."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training_runs import LENGTH, Rows, adapter_bytes, small_model, train
from safetensors.torch import load_file

os.environ["HF_HUB_OFFLINE"] = "1"

from bumblebee import Bumblebee  # noqa: E402
from bumblebee.checkpoint.consolidate import consolidate  # noqa: E402
from bumblebee.checkpoint.hf_folder import is_model_folder  # noqa: E402
from bumblebee.checkpoint.sharded_state import ShardReader  # noqa: E402
from bumblebee.lora import LoRA  # noqa: E402
from bumblebee.nn import IGNORE_INDEX
from bumblebee.training.run_folder import clear, holds_a_run  # noqa: E402
from bumblebee.verify.reference_loop import sample_indices

EACH_STAGE = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
# A larger eps than usual: Adam amplifies rounding errors of tiny gradients.
ADAM = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}
ADAPTER = {"rank": 4, "alpha": 8}
FILES = {"adapter_config.json", "adapter_model.safetensors", "generation_config.json"}
SAVE = {"checkpoint": ("Checkpoint", {"every": 3, "keep": None})}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    folder = tmp_path_factory.mktemp("base")
    small_model().save_pretrained(folder)
    return folder


def fit(folder: Path, base: Path, dropout: float = 0.1, dora: bool = False, **job: Any) -> list[dict[str, float]]:
    """A small LoRA run with fixed initial adapters."""
    return train(folder, base=str(base), lora={**ADAPTER, "dropout": dropout, "dora": dora}, callbacks=SAVE, **job)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def plain_peft(base: Path, start: Path, steps: int) -> dict[str, torch.Tensor]:
    """Reference loop: the transformers model with PEFT."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    model = PeftModel.from_pretrained(theirs, start, is_trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, vectors = ([p for p in trained if p.ndim == ndim] for ndim in (2, 1))
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **ADAM)
    rows = Rows()
    rows.setup(0)
    for chosen in sample_indices(len(rows.train), 4, steps, 42):
        inputs, labels = (torch.stack(part) for part in zip(*(rows.train[index] for index in chosen), strict=True))
        targets = int((labels != IGNORE_INDEX).sum())
        if targets == 0:
            continue
        logits = model(inputs).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        (loss / targets).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return get_peft_model_state_dict(model, save_embedding_layers=False)


# -- training -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_every_stage_matches_reference_loop_with_peft(base: Path, tmp_path: Path, dora: bool) -> None:
    torch.manual_seed(42)
    model = Bumblebee.from_pretrained(base)
    LoRA(**ADAPTER, dropout=0.0, dora=dora)(model)
    model.save_pretrained(tmp_path / "start")
    wanted, start = plain_peft(base, tmp_path / "start", 6), adapter(tmp_path / "start")
    assert max(float((wanted[name] - start[name]).abs().max()) for name in wanted) > 0.01
    for stage in range(4):
        fit(tmp_path / str(stage), base, dropout=0.0, dora=dora, zero_stage=stage, optimizer=("AdamW", ADAM))
        for name, tensor in adapter(tmp_path / str(stage)).items():
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
def test_bf16_agrees_at_every_stage(base: Path, tmp_path: Path) -> None:
    fit(tmp_path / "fp32", base, dropout=0.0)
    true = adapter(tmp_path / "fp32")
    for stage in range(4):
        fit(tmp_path / str(stage), base, dropout=0.0, precision="bf16", zero_stage=stage)
        found = adapter(tmp_path / str(stage))
        apart = sum(float((found[name].float() - true[name]).abs().sum()) for name in true if "lora_B" in name)
        assert 0 < apart < 0.2 * sum(float(true[name].abs().sum()) for name in true if "lora_B" in name)


@pytest.mark.parametrize("stage", EACH_STAGE)
def test_resume_is_byte_identical(base: Path, tmp_path: Path, stage: int) -> None:
    """With dropout, whose random state must be restored too."""
    job = {"zero_stage": stage, "precision": "bf16" if stage else "fp32"}
    fit(tmp_path / "whole", base, **job)
    fit(tmp_path / "part", base, resume=str(tmp_path / "whole" / "checkpoint-3"), **job)
    assert adapter_bytes(tmp_path / "part") == adapter_bytes(tmp_path / "whole")
    first = adapter(tmp_path / "whole" / "checkpoint-3")
    assert any(not torch.equal(tensor, first[name]) for name, tensor in adapter(tmp_path / "whole").items())


def test_dropout_and_seed_change_the_run(base: Path, tmp_path: Path) -> None:
    fit(tmp_path / "with", base)
    fit(tmp_path / "without", base, dropout=0.0)
    assert adapter_bytes(tmp_path / "with") != adapter_bytes(tmp_path / "without")


# -- saving -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", EACH_STAGE)
def test_run_saves_no_base_weights(base: Path, tmp_path: Path, stage: int) -> None:
    fit(tmp_path / "run", base, zero_stage=stage)
    checkpoint = tmp_path / "run" / "checkpoint-6"
    assert {file.name for file in checkpoint.iterdir()} == FILES | {"training_state", "trainer_state.json", "SHA256SUMS"}
    assert adapter_bytes(checkpoint) == adapter_bytes(tmp_path / "run")
    tensors = adapter(checkpoint)
    assert len(tensors) == 2 * 2 * 7 and all(tensor.numel() for tensor in tensors.values())
    assert not list((tmp_path / "run").rglob("model*.safetensors"))
    assert is_model_folder(checkpoint) and holds_a_run(tmp_path / "run")
    with ShardReader(checkpoint / "training_state") as reader:
        assert len(reader.shapes) == len(tensors) and all(".lora_" in name for name in reader.shapes)
    clear(tmp_path / "run")
    assert not holds_a_run(tmp_path / "run") and not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (3, "bf16"), pytest.param(1, "bf16", marks=pytest.mark.slow)])
def test_consolidation_gives_the_gathered_adapter(base: Path, tmp_path: Path, stage: int, precision: str) -> None:
    checkpoint = {"checkpoint": ("Checkpoint", {"every": 6, "model": False})}
    job = {"zero_stage": stage, "precision": precision, "callbacks": checkpoint}
    train(tmp_path / "run", base=str(base), lora=ADAPTER, **job)
    saved = tmp_path / "run" / "checkpoint-6"
    assert not (saved / "adapter_model.safetensors").exists() and not is_model_folder(saved)
    consolidate(saved, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES | {"SHA256SUMS"}
    ours, gathered = adapter(tmp_path / "out"), adapter(tmp_path / "run")
    assert ours.keys() == gathered.keys()
    for name, tensor in gathered.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    ids = torch.arange(LENGTH)[None]
    assert torch.equal(Bumblebee.from_pretrained(tmp_path / "out")(ids), Bumblebee.from_pretrained(tmp_path / "run")(ids))
    consolidate(saved, saved, dtype="float32")
    assert is_model_folder(saved) and adapter(saved)[name].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_next_run_chains_adapters(base: Path, tmp_path: Path, stage: int) -> None:
    """At stage 3, merging happens while the model is sharded."""
    fit(tmp_path / "first", base, dropout=0.0)
    fit(tmp_path / "second", tmp_path / "first", dropout=0.0, zero_stage=stage)
    named = json.loads((tmp_path / "second" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "first")
    merged = Bumblebee.from_pretrained(tmp_path / "first")
    merged.save_pretrained(tmp_path / "merged")
    fit(tmp_path / "other", tmp_path / "merged", dropout=0.0, zero_stage=stage)
    assert adapter_bytes(tmp_path / "second") == adapter_bytes(tmp_path / "other")


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_full_run_starts_from_adapter_folder(base: Path, tmp_path: Path, stage: int) -> None:
    fit(tmp_path / "first", base)
    train(tmp_path / "full", base=str(tmp_path / "first"), zero_stage=stage, max_steps=1)
    assert (tmp_path / "full" / "model.safetensors").is_file() and not (tmp_path / "full" / "adapter_config.json").exists()


@pytest.mark.parametrize("stage", [0, 3])
def test_the_callbacks_work_with_adapters(base: Path, tmp_path: Path, stage: int, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = {
        "summary": ("RunSummary", {}), "throughput": ("Throughput", {"peak_tflops": 1.0}), "tensorboard": ("TensorBoard", {}),
        "metrics": ("MetricsHistory", {}), "validation": ("Validation", {"every": 3}),
        "checkpoint": ("Checkpoint", {"every": 3, "model": False}), "consolidate": ("Consolidate", {}),
    }  # fmt: skip
    train(tmp_path / "run", base=str(base), lora=ADAPTER, zero_stage=stage, callbacks=callbacks)
    assert adapter_bytes(tmp_path / "run" / "checkpoint-6") == adapter_bytes(tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["model"]
    trained = sum(tensor.numel() for tensor in adapter(tmp_path / "run").values())
    assert summary["trainable_parameters"] == trained
    assert summary["parameters"] == trained + small_model().num_parameters()
    assert f"({trained / summary['parameters']:.2%}) trainable" in capsys.readouterr().out


# -- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_resume_refuses_another_base_or_adapter(base: Path, tmp_path: Path) -> None:
    small_model(seed=1).save_pretrained(tmp_path / "other")
    fit(tmp_path / "run", base)
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    said = f"trainer.resume: .*checkpoint-3 was trained on the base model {base}, but this run uses {tmp_path / 'other'}"
    with pytest.raises(ValueError, match=said):
        fit(tmp_path / "then", tmp_path / "other", resume=checkpoint)
    for lora, said in (
        ({"rank": 2}, "LoRA rank 4, this run has 2"),
        ({"rank": 4, "alpha": 5}, r"LoRA alpha \d+, this run has 5"),
    ):
        with pytest.raises(ValueError, match=f"trainer.resume: {checkpoint} was trained with {said}: "):
            train(tmp_path / "then", base=str(base), lora=lora, resume=checkpoint)
    with pytest.raises(ValueError, match="holds another model"):
        train(tmp_path / "then", base=str(base), resume=checkpoint)
    assert not (tmp_path / "then").exists()


def test_run_does_not_delete_its_base(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "base")
    small_model().save_pretrained(tmp_path / "base" / "checkpoint-3")
    for folder in (tmp_path / "base", tmp_path / "base" / "checkpoint-3"):
        with pytest.raises(ValueError, match="output_dir: .*base contains the base model .*, which adapters need"):
            fit(tmp_path / "base", folder, overwrite=True)
    assert is_model_folder(tmp_path / "base") and is_model_folder(tmp_path / "base" / "checkpoint-3")


def test_resume_with_moved_base(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    fit(tmp_path / "whole", tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "moved")
    fit(tmp_path / "part", tmp_path / "moved", resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert adapter_bytes(tmp_path / "part") == adapter_bytes(tmp_path / "whole")
