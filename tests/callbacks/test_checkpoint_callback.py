from __future__ import annotations

import pytest

from bumblebee.run_folder import checkpoints, read_trainer_state
from callbacks import Checkpoint
from callbacks.checkpoint import delete


def steps(folder):
    return [checkpoint.step for checkpoint in checkpoints(folder)]


def test_it_saves_every_n_steps_and_the_end_as_last(fake):
    trainer = fake([Checkpoint(every=4)], steps=10).run()
    assert trainer.events == [("save", 4), ("save", 8), ("save last", 10)]


def test_a_step_that_is_due_for_two_reasons_is_saved_once(fake):
    assert fake([Checkpoint(every=3)], steps=6).run().events == [("save", 3), ("save last", 6)]


def test_a_step_that_another_callback_saved_is_not_saved_again(fake):
    assert fake([Checkpoint(every=3), Checkpoint(every=3)], steps=3).run().events == [("save last", 3)]


def test_every_null_saves_only_at_the_end(fake):
    assert fake([Checkpoint(every=None)]).run().events == [("save last", 6)]


def test_without_save_last_only_the_multiples_are_saved(fake):
    assert fake([Checkpoint(every=4, save_last=False)], steps=8).run().events == [("save", 4), ("save", 8)]


def test_a_run_that_a_callback_stopped_saves_its_end(fake):
    trainer = fake([Checkpoint(every=100)])
    trainer.stop_at = 3
    assert trainer.run().events == [("save last", 3)]


def test_an_interrupted_run_is_saved_even_without_save_last(fake):
    trainer = fake([Checkpoint(every=None, save_last=False)])
    trainer.stop_at, trainer.interrupted = 2, True
    assert trainer.run().events == [("save last", 2)]


def test_the_newest_are_kept_beside_the_last(fake, tmp_path):
    fake([Checkpoint(every=2, keep=2)], steps=9).run()
    assert steps(tmp_path) == [6, 8, 9]


def test_keep_null_keeps_all(fake, tmp_path):
    fake([Checkpoint(every=2, keep=None)], steps=7).run()
    assert steps(tmp_path) == [2, 4, 6, 7]


def test_rotation_finds_checkpoints_of_earlier_runs(fake, tmp_path, checkpoint_at):
    for step in (2, 4, 6):
        checkpoint_at(tmp_path, step)
    fake([Checkpoint(every=2, keep=2)], steps=8, step=6).run()
    assert steps(tmp_path) == [4, 6, 8]  # 8 is the last, outside of the count


def test_the_last_of_a_run_that_was_extended_counts_as_an_ordinary_one(fake, tmp_path):
    fake([Checkpoint(every=2, keep=2)], steps=5).run()
    assert steps(tmp_path) == [2, 4, 5]
    fake([Checkpoint(every=2, keep=2)], steps=9, step=5).run()
    assert steps(tmp_path) == [6, 8, 9]


def test_checkpoints_after_the_step_resumed_from_are_left_alone(fake, tmp_path, checkpoint_at):
    for step in (2, 20, 30):
        checkpoint_at(tmp_path, step)
    fake([Checkpoint(every=1, keep=1, save_last=False)], steps=4, step=2).run()
    assert steps(tmp_path) == [4, 20, 30]


def test_only_complete_checkpoints_are_counted_and_other_files_stay(fake, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()  # no trainer_state.json
    (tmp_path / "checkpoint-notes.txt").touch()
    fake([Checkpoint(every=2, keep=1)], steps=6).run()
    assert steps(tmp_path) == [4, 6]
    assert (tmp_path / "checkpoint-1").is_dir() and (tmp_path / "checkpoint-notes.txt").is_file()


def test_rotation_comes_after_the_new_checkpoint_is_complete(fake, tmp_path, checkpoint_at):
    checkpoint_at(tmp_path, 1)
    trainer = fake([Checkpoint(every=1, keep=1)], steps=9, step=1)

    def full_disk(last=False):
        raise OSError("no space left on device")

    trainer.save_checkpoint = full_disk
    with pytest.raises(OSError, match="no space"):
        trainer.run()
    assert steps(tmp_path) == [1]


def test_a_deletion_that_was_killed_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, checkpoint_at, monkeypatch):
    path = checkpoint_at(tmp_path, 3)

    def killed(folder):
        if folder.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("callbacks.checkpoint.remove", killed)
        delete(path)
    (left,) = tmp_path.iterdir()
    assert steps(tmp_path) == [] and left.match(".*.partial")  # the trainer sweeps up .*.partial when it starts
    delete(checkpoint_at(tmp_path, 3))  # what is left is not in the way
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"every": 0}, {"keep": 0}, {"keep": -1}])
def test_numbers_below_one_are_refused(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name} must be at least 1 or null, got {value}"):
        Checkpoint(**options)


def test_a_real_run_leaves_checkpoints_that_a_run_can_be_resumed_from(whole, continued):
    for run in (whole, continued):
        assert steps(run.folder) == [2, 4, 6]
        assert [checkpoint.last for checkpoint in checkpoints(run.folder)] == [False, False, True]
    ends = [read_trainer_state(run.folder / "checkpoint-6") for run in (whole, continued)]
    assert ends[0]["tokens"] == ends[1]["tokens"]
