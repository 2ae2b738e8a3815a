"""Consolidating the ranks' shards writes the same model folder as a gathered save."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.training_runs import train, weight_bytes
from safetensors.torch import load_file

from bumblebee.checkpoint.consolidate import consolidate
from bumblebee.cli.main import main
from bumblebee.model import Bumblebee

RUNS = [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")]


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: f"stage{run[0]}-{run[1]}")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint without weights, and gathered weights of the same step in the output folder."""
    stage, precision = request.param
    folder = tmp_path_factory.mktemp(f"run{stage}")
    checkpoint = ("Checkpoint", {"every": 4, "model": False})
    train(folder, zero_stage=stage, precision=precision, max_steps=4, callbacks={"checkpoint": checkpoint})
    return folder


@pytest.mark.slow
def test_consolidated_weights_are_the_gathered_ones(run: Path, tmp_path: Path) -> None:
    assert not (run / "checkpoint-4" / "model.safetensors").exists()
    consolidate(run / "checkpoint-4", tmp_path / "out")
    weights, gathered = load_file(tmp_path / "out" / "model.safetensors"), load_file(run / "model.safetensors")
    assert weights.keys() == gathered.keys()
    for name, tensor in gathered.items():
        assert weights[name].dtype == tensor.dtype and torch.equal(weights[name], tensor), name
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((run / "config.json").read_text())


def test_consolidation_writes_shards_in_any_dtype(run: Path, tmp_path: Path) -> None:
    consolidate(run / "checkpoint-4", tmp_path / "out", dtype="float32", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    model = Bumblebee.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.dtype == torch.float32
    gathered = Bumblebee.from_pretrained(run, dtype=torch.float32)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids), gathered(ids), rtol=0.05, atol=0.05)


def test_consolidation_in_place(tmp_path: Path) -> None:
    callbacks = {"checkpoint": ("Checkpoint", {"every": 2, "model": False}), "consolidate": ("Consolidate", {})}
    train(tmp_path, max_steps=2, zero_stage=3, callbacks=callbacks)
    assert weight_bytes(tmp_path / "checkpoint-2") == weight_bytes(tmp_path)
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()


def test_command_names_what_is_not_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["consolidate", str(tmp_path / "nothing"), "--output", str(tmp_path / "out")])
    assert done.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "nothing" in lines[0]
    assert not (tmp_path / "out").exists()


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown dtype 'fp8'"):
        consolidate(tmp_path, tmp_path / "out", dtype="fp8")
