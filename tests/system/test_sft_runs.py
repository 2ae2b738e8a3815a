"""Fine-tuning runs with batches of similar length: resuming and several ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import TESTS, run_jobs
from helpers.training_runs import train, weight_bytes

FILE = str(TESTS / "golden" / "chats.jsonl")
BY_LENGTH: dict[str, Any] = {
    "data": ("Chats", {"file": FILE, "max_length": 128, "packing": False}), "model": {"vocab_size": 400}, "max_steps": 14,
    "micro_batch_size": 2, "accumulate": 2,
}  # fmt: skip
EACH = {"checkpoint": ("Checkpoint", {"every": 3})}


@pytest.mark.slow
def test_resume_with_length_batches_is_byte_identical(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", **BY_LENGTH)
    train(tmp_path / "pieces", **BY_LENGTH, callbacks={**EACH, "stop": ("StopAfter", {"step": 7})})
    assert train(tmp_path / "pieces", **BY_LENGTH, resume="auto", callbacks=EACH) == whole
    assert max(line["epoch"] for line in whole) > 1
    assert weight_bytes(tmp_path / "pieces") == weight_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_with_length_batches_train_like_one(tmp_path: Path) -> None:
    alone = train(tmp_path / "alone", **BY_LENGTH, callbacks=EACH)
    two = {**BY_LENGTH, "accumulate": 1}
    resume = str(tmp_path / "alone" / "checkpoint-6")
    jobs = [
        {"folder": str(tmp_path / "two"), **two},
        {"folder": str(tmp_path / "continued"), **two, "resume": resume},
    ]
    whole, continued = (result["metrics"] for result in run_jobs(jobs, ranks=2, folder=tmp_path))
    for lines in (whole, continued):
        assert [line["step"] for line in lines] == [line["step"] for line in alone]
        for line, expected in zip(lines, alone, strict=True):
            assert line["tokens"] == expected["tokens"]
            assert math.isclose(line["loss"], expected["loss"], rel_tol=1e-4), line["step"]
