from __future__ import annotations

from dataclasses import replace

import pytest

from bumblebee.training.plan import Position
from callbacks import Validation


def validations(trainer):
    return [step for event, step in trainer.run().events if event == "validate"]


def test_every_n_steps_and_at_the_end(stub_trainer):
    assert validations(stub_trainer([Validation(every=4)], steps=10)) == [4, 8, 10]


def test_every_null_validates_at_the_end_of_each_epoch(stub_trainer):
    assert validations(stub_trainer([Validation()], steps=8)) == [3, 6, 8]


def test_epochs_end_with_the_data_after_a_resume(stub_trainer):
    trainer = stub_trainer([Validation()], steps=9, step=4)
    trainer.plan = replace(trainer.plan, origin=Position(step=4, epoch=0, sample=16))  # six of 22 samples are left
    assert validations(trainer) == [5, 8, 9]


def test_step_due_for_several_reasons_is_validated_once(stub_trainer):
    assert validations(stub_trainer([Validation(every=3, at_start=True)], steps=6)) == [0, 3, 6]


def test_without_at_end_only_multiples_are_validated(stub_trainer):
    assert validations(stub_trainer([Validation(every=4, at_end=False)], steps=10)) == [4, 8]


def test_resumed_run_does_not_validate_at_start(stub_trainer):
    assert validations(stub_trainer([Validation(every=4, at_start=True)], steps=10, step=4)) == [8, 10]


def test_validation_samples_are_required(fit, tmp_path):
    run = fit(tmp_path / "run", {"validation": Validation()}, num_validation=0)
    assert isinstance(run.error, ValueError)
    assert "data.validation_ratio or data.validation_files" in str(run.error)


def test_every_below_one_raises():
    with pytest.raises(ValueError, match="every must be at least 1 or null, got 0"):
        Validation(every=0)


def test_real_run_logs_its_validations(complete_run):
    lines = [line for line in (complete_run.folder / "log.txt").read_text().splitlines() if "validation at step" in line]
    assert [line.partition("step ")[2][0] for line in lines] == ["0", "3", "6"]
