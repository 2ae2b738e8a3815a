"""A model that uses a block twice: saved under both names, resumed, consolidated and loaded again."""

from __future__ import annotations

import pytest
import torch
from helpers.training_runs import train, weight_bytes, weights
from helpers.zero_stages import EACH_STAGE

from bumblebee import Bumblebee
from bumblebee.checkpoint.consolidate import consolidate


@pytest.mark.parametrize("stage", EACH_STAGE)
def test_a_block_used_twice_is_saved_resumed_and_consolidated(stage, tmp_path):
    every = {"checkpoint": ("Checkpoint", {"every": 2, "model": False})}
    job = {"task": "BlockUsedTwice", "zero_stage": stage, "max_steps": 4, "callbacks": every}
    train(tmp_path / "whole", **job)
    train(tmp_path / "resumed", **job, resume=str(tmp_path / "whole" / "checkpoint-2"))
    consolidate(tmp_path / "whole" / "checkpoint-4", tmp_path / "consolidated")
    saved = weights(tmp_path / "whole")
    second = [name for name in saved if ".layers.1." in name]
    assert len(second) == 12 and all(torch.equal(saved[name], saved[name.replace(".1.", ".0.")]) for name in second)
    assert weight_bytes(tmp_path / "resumed") == weight_bytes(tmp_path / "consolidated") == weight_bytes(tmp_path / "whole")
    Bumblebee.from_pretrained(tmp_path / "consolidated")  # with a block for each name
