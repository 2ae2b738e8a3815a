"""Sharded training state: any partition can be read back at any range."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from bumblebee.checkpoint import sharded_state
from bumblebee.checkpoint.sharded_state import SavedShard, ShardReader, write_shards


def write_partition(folder: Path, tensors: dict[str, torch.Tensor], cuts: list[int], limit: int = 2**30) -> None:
    """Write tensors like ranks that partition their concatenated elements at ``cuts``."""
    bounds = [0, *sorted(cuts), sum(t.numel() for t in tensors.values())]
    for rank, (low, high) in enumerate(zip(bounds, bounds[1:], strict=False)):
        shards, position = [], 0
        for name, tensor in tensors.items():
            first, last = max(low, position), min(high, position + tensor.numel())
            if first < last:
                part = tensor.flatten()[first - position : last - position]
                kept = {"fp32": part, "exp_avg": part * 2, "step": torch.tensor(7.0)}
                shards.append(SavedShard(name, tuple(tensor.shape), first - position, last - first, kept))
            position += tensor.numel()
        write_shards(folder, f"optimizer-{rank:05d}-of-{len(bounds) - 1:05d}", shards, limit)


@settings(max_examples=30)
@given(data=st.data())
def test_any_partition_reads_back_at_any_range(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=4))
    tensors = {f"layer.{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    total = sum(t.numel() for t in tensors.values())
    cuts = data.draw(st.lists(st.integers(0, total), max_size=5))
    folder = tmp_path_factory.mktemp("shards")
    write_partition(folder, tensors, cuts, limit=data.draw(st.sampled_from([1, 100, 2**30])))
    with ShardReader(folder) as reader:
        assert {name: tuple(t.shape) for name, t in tensors.items()} == reader.shapes
        for name, tensor in tensors.items():
            assert reader.kinds(name) == ["exp_avg", "step"]
            assert torch.equal(reader.parameter(name), tensor)
            start = data.draw(st.integers(0, tensor.numel() - 1))
            count = data.draw(st.integers(1, tensor.numel() - start))
            assert torch.equal(reader.read("exp_avg", name, start, count), 2 * tensor.flatten()[start : start + count])
            assert reader.read("step", name, start, count).item() == 7


def test_shards_are_split_over_files_by_size(tmp_path: Path) -> None:
    write_partition(tmp_path, {f"layer.{i}": torch.zeros(10) for i in range(4)}, [], limit=100)  # of 40 bytes each
    names = {f"optimizer-00000-of-00001{number}.safetensors" for number in ("", "-1")}
    assert {file.name for file in tmp_path.iterdir()} == names


def test_missing_file_of_a_rank_is_named(tmp_path: Path) -> None:
    write_partition(tmp_path, {"weight": torch.arange(12.0).reshape(3, 4)}, [5])
    (tmp_path / "optimizer-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks elements 5 to 12 of weight: a rank's file is missing"):
        ShardReader(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no training state"):
        ShardReader(tmp_path)
    (tmp_path / "optimizer-00000-of-00001.safetensors").write_bytes(b"nonsense" * 10)
    with pytest.raises(ValueError, match="optimizer-00000-of-00001.safetensors is damaged"):
        ShardReader(tmp_path)


def test_damaged_file_closes_those_opened_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_partition(tmp_path, {"weight": torch.arange(12.0)}, [5])
    (tmp_path / "optimizer-00001-of-00002.safetensors").write_bytes(b"nonsense" * 10)
    closed = []

    @contextmanager
    def recording_open(file: Path, framework: str) -> Iterator[safe_open]:
        with safe_open(file, framework) as tensors:
            try:
                yield tensors
            finally:
                closed.append(file.name)

    monkeypatch.setattr(sharded_state, "safe_open", recording_open)
    with pytest.raises(ValueError, match="optimizer-00001-of-00002.safetensors is damaged"):
        ShardReader(tmp_path)
    assert closed == ["optimizer-00000-of-00002.safetensors"]
