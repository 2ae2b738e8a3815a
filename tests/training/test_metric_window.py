"""Sums of a line of metrics in a checkpoint, resumed with another number of ranks: each is in the sums of one rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bumblebee.training.metrics.accumulator import MetricAccumulator
from bumblebee.training.metrics.window import load_window, save_window


class RouterTask:
    """A task with sums of its own."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def metric_sums(self) -> dict[str, torch.Tensor]:
        return self.sums

    def restore_metric_sums(self, sums: dict[str, torch.Tensor]) -> None:
        self.sums = sums


def run_of(ranks: int) -> Any:
    return SimpleNamespace(
        accumulator=MetricAccumulator(),
        task=RouterTask(),
        extra_metrics={},
        device="cpu",
        plan=SimpleNamespace(world_size=ranks),
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_sums_add_up_for_any_number_of_ranks(ranks, tmp_path, monkeypatch):
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        run = run_of(3)
        run.accumulator.sums, run.accumulator.counts = {"loss": torch.tensor(0.1 + rank), "z": torch.tensor(1.0)}, {"loss": 9}
        run.task.sums = {"router": torch.tensor([[rank, 1.0]])}
        assert list(save_window(run, tmp_path)) == [f"metrics-0000{rank}.json"]
    restored = []
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        restored.append(run_of(ranks))
        load_window(restored[-1], tmp_path, saved_ranks=3)
    assert {tuple(run.accumulator.sums) for run in restored} == {("loss", "z")}
    assert sum(run.accumulator.sums["loss"] for run in restored) == pytest.approx(3.3)
    assert sum(run.accumulator.sums["z"] for run in restored) == 3
    assert all(run.accumulator.counts == {"loss": 9} for run in restored)
    assert sum(run.task.sums["router"] for run in restored).tolist() == [[3.0, 3.0]]


def test_nothing_is_written_right_after_a_line(tmp_path):
    run = run_of(1)
    assert save_window(run, tmp_path) == {} and not list(tmp_path.iterdir())
    load_window(run, tmp_path, saved_ranks=1)
    assert run.accumulator.sums == {}
