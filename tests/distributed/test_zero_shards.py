"""Restored optimizer state is where the optimizer expects it. Meta tensors stand in for a GPU's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bumblebee.distributed.deepspeed.zero_shards import Shard, restore_shards

STATE = {"fp32": torch.ones(4), "exp_avg": torch.ones(4), "mu": torch.tensor(0.5), "step": torch.tensor(3.0)}
READER = SimpleNamespace(
    read=lambda kind, name, start, numel: STATE[kind],
    kinds=lambda name: [*STATE][1:],
    other_state=lambda name, device: {"row": torch.ones(2, device=device)},
)


@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}, {"fused": None}, {}], ids=str)
def test_restored_state_is_on_the_device_of_its_optimizer(options):
    flat = torch.empty(4, device="meta")
    optimizer = SimpleNamespace(state={}, param_groups=[{"params": [], **options}])  # as ZeRO-3 leaves it between steps
    restore_shards([Shard("w", (4,), 0, 4, flat, 0)], optimizer, READER)
    step = "meta" if any(options.values()) else "cpu"
    assert {kind: value.device.type for kind, value in optimizer.state[flat].items()} == {
        "row": "meta", "exp_avg": "meta", "mu": "meta", "step": step,
    }  # fmt: skip
