"""Training with frozen weights: they are unchanged, saved in every folder, and kept by a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.training_runs import train
from safetensors.torch import load_file

from bumblebee.checkpoint.consolidate import consolidate

SAVE = {"checkpoint": ("Checkpoint", {"every": 3, "keep": None})}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_frozen_weights_are_unchanged_saved_and_resumed(tmp_path: Path, stage: int) -> None:
    job = {"task": "PartlyFrozen", "zero_stage": stage, "building": True}
    train(tmp_path / "none", max_steps=1, optimizer=("AdamW", {"lr": 0.0}), **job)
    train(tmp_path / "run", callbacks=SAVE, **job)
    start, end = (load_file(tmp_path / name / "model.safetensors") for name in ("none", "run"))
    assert start.keys() == end.keys()
    moved = {key for key in start if not torch.equal(start[key], end[key])}
    assert moved == {key for key in start if "proj" not in key and "embed" not in key}
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert load_file(checkpoint / "model.safetensors").keys() == end.keys()
    train(tmp_path / "again", resume=str(checkpoint), **job)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[key], end[key]) for key in end)
    with pytest.raises(
        ValueError, match="was trained with .* tensors frozen, .*use the checkpoint itself, which is a model folder"
    ):
        consolidate(checkpoint, tmp_path / "other")
