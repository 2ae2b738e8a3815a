from __future__ import annotations

import json
import math

import pytest

from bumblebee.callback import Callback
from bumblebee.training.run_folder import checkpoints, read_trainer_state
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

    def full_disk(last=False, model=True):
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


# -- by the clock ------------------------------------------------------------------------------------------------------


def test_minutes_save_when_so_much_time_has_passed_since_the_last_checkpoint(fake, monkeypatch):
    clock = Clock(monkeypatch)
    callback = Checkpoint(every=7, minutes=1, save_last=False)
    trainer = fake([clock.ticking(20), callback], steps=13)  # twenty seconds a step
    assert trainer.run().events == [("save", 3), ("save", 6), ("save", 7), ("save", 10), ("save", 13)]


def test_rank_0s_clock_decides_for_all(fake, monkeypatch):
    clock = Clock(monkeypatch)
    trainer = fake([clock.ticking(1000), Checkpoint(every=None, minutes=1, save_last=False)], steps=2, is_main=False)
    asked = []

    def reduce_sums(sums):
        asked.append(sums)
        return {"due": float(trainer.step == 2)}  # so says rank 0

    trainer.reduce_sums = reduce_sums
    assert trainer.run().events == [("save", 2)]
    assert asked == [{"due": False}, {"due": False}]


class Clock:
    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("callbacks.checkpoint.time.monotonic", lambda: self.now)

    def ticking(self, seconds):
        clock = self

        class Tick(Callback):
            def on_step_start(self, trainer):
                clock.now += seconds

        return Tick()


# -- the best ----------------------------------------------------------------------------------------------------------


def best_file(folder):
    return json.loads((folder / "best.json").read_text())


@pytest.mark.parametrize(
    ("mode", "values"),
    [("min", (5.0, 3.0, 4.0, 2.0, 6.0, 2.5)), ("max", (-5.0, -3.0, -4.0, -2.0, -6.0, -2.5))],
)
def test_the_best_are_saved_when_they_appear_and_stay(mode, values, fake, scripted, tmp_path):
    callback = Checkpoint(every=None, keep=1, best=2, mode=mode, save_last=False)
    trainer = fake([scripted(*values), callback], steps=6).run()
    assert trainer.events == [("save", 1), ("save", 2), ("save", 3), ("save", 4), ("save", 6)]
    assert steps(tmp_path) == [3, 4, 6]  # 4 and 6 are the best, 3 is the newest of the others
    assert best_file(tmp_path) == {"checkpoint": "checkpoint-4", "metric": "validation_loss", "value": values[3]}


def test_rotation_never_takes_one_of_the_best(fake, scripted, tmp_path):
    fake([scripted(1.0, 2.0, 3.0), Checkpoint(every=1, keep=1, best=2, save_last=False)], steps=9).run()
    assert steps(tmp_path) == [1, 2, 9]


def test_one_that_is_no_longer_among_the_best_falls_back_into_the_rotation(fake, scripted, tmp_path):
    values = (9.0, 8.0, 7.0, 6.0, 5.0)
    fake([scripted(*values), Checkpoint(every=None, keep=2, best=1, save_last=False)], steps=5).run()
    assert steps(tmp_path) == [3, 4, 5]


def test_of_equal_values_the_older_is_better_and_the_newer_no_reason_to_save(fake, scripted, tmp_path):
    trainer = fake([scripted(2.0, 1.0, 1.0, 1.0), Checkpoint(every=None, best=2, save_last=False)], steps=4).run()
    assert trainer.events == [("save", 1), ("save", 2), ("save", 3)]  # step 4 ties with both
    assert best_file(tmp_path)["checkpoint"] == "checkpoint-2"


def test_only_a_validation_at_its_own_step_gives_a_checkpoint_its_value(fake, scripted, tmp_path):
    fake([scripted(None, 1.0, None, 3.0), Checkpoint(every=3, keep=1, best=3, save_last=False)], steps=6).run()
    assert steps(tmp_path) == [2, 4, 6]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_never_the_best(value, fake, scripted, tmp_path):
    trainer = fake([scripted(value, 3.0, value), Checkpoint(every=None, best=3, save_last=False)], steps=3).run()
    assert trainer.events == [("save", 2)]


def test_the_order_of_the_callbacks_does_not_matter(fake, scripted, tmp_path):
    fake([Checkpoint(every=None, best=1, save_last=False), scripted(3.0, 1.0, 2.0)], steps=3).run()
    assert best_file(tmp_path)["checkpoint"] == "checkpoint-2"


def test_a_metric_that_is_not_measured_is_refused_with_those_that_are(fake, scripted):
    with pytest.raises(ValueError, match="Checkpoint: unknown metric 'accuracy'; validation reports validation_loss"):
        fake([scripted(1.0), Checkpoint(best=1, metric="accuracy")]).run()


def test_the_best_of_nothing_held_out_is_refused(fake):
    trainer = fake([Checkpoint(best=1)])
    trainer.data.validation = None
    with pytest.raises(ValueError, match="Checkpoint needs validation samples"):
        trainer.run()
    fake([Checkpoint()]).run()  # without best nobody asks


def test_a_run_from_the_start_forgets_the_best_of_an_earlier_one(fake, scripted, tmp_path):
    (tmp_path / "best.json").write_text("{}")
    trainer = fake([Checkpoint(every=None, best=1, save_last=False)], steps=1).run()
    assert trainer.events == [] and not (tmp_path / "best.json").exists()


VALUES = (4.0, 2.0, 3.0, 1.0, 5.0, 2.5)


def by_best(**changes):
    return Checkpoint(**{"every": 3, "keep": 1, "best": 2, "save_last": False, **changes})


def test_a_resumed_run_knows_the_best_of_before(fit, scripted, fail_after, tmp_path):
    fit(tmp_path / "whole", {"values": scripted(*VALUES), "checkpoint": by_best()})
    fit(tmp_path / "run", {"values": scripted(*VALUES), "checkpoint": by_best(), "fail": fail_after(3)})
    assert steps(tmp_path / "run") == [1, 2, 3] and best_file(tmp_path / "run")["checkpoint"] == "checkpoint-2"
    run = fit(tmp_path / "run", {"values": scripted(*VALUES), "checkpoint": by_best()}, resume="auto")
    assert run.error is None
    assert steps(tmp_path / "run") == steps(tmp_path / "whole") == [2, 4, 6]
    assert best_file(tmp_path / "run") == best_file(tmp_path / "whole")
    assert best_file(tmp_path / "run") == {"checkpoint": "checkpoint-4", "metric": "validation_loss", "value": 1.0}
    state = read_trainer_state(tmp_path / "run" / "checkpoint-4")["callbacks"]["checkpoint"]
    assert state["best"] == [[4, 1.0], [2, 2.0]]  # a checkpoint knows of itself


def test_resumed_from_an_older_checkpoint_the_best_are_those_of_that_time(fit, scripted, tmp_path):
    fit(tmp_path / "run", {"values": scripted(*VALUES), "checkpoint": by_best()})
    worse = (None,) * 2 + (9.0,) * 4
    checkpoint = tmp_path / "run" / "checkpoint-2"
    fit(tmp_path / "run", {"values": scripted(*worse), "checkpoint": by_best(best=1)}, resume=str(checkpoint), max_steps=3)
    assert best_file(tmp_path / "run")["checkpoint"] == "checkpoint-2" and 2 in steps(tmp_path / "run")


def test_a_best_one_that_somebody_deleted_is_forgotten(fit, scripted, tmp_path):
    uses = {"values": scripted(1.0, 3.0, None, 2.0), "checkpoint": by_best(keep=None, every=2)}
    fit(tmp_path / "run", uses, max_steps=2)
    delete(tmp_path / "run" / "checkpoint-1")
    fit(tmp_path / "run", uses, resume="auto", max_steps=4)
    assert best_file(tmp_path / "run") == {"checkpoint": "checkpoint-4", "metric": "validation_loss", "value": 2.0}


def test_the_best_by_another_metric_or_mode_are_forgotten():
    old = {"metric": "validation_loss", "mode": "min", "best": [[4, 1.0], [2, 2.0]]}
    for callback, kept in ((by_best(best=1), [[4, 1.0]]), (by_best(mode="max"), []), (by_best(metric="accuracy"), [])):
        callback.load_state_dict(old)
        assert callback.state_dict()["best"] == kept
    by_best().load_state_dict({})  # of a checkpoint from before there was a state


def test_without_model_the_checkpoints_hold_only_the_training_state(fit, tmp_path):
    fit(tmp_path / "run", {"checkpoint": Checkpoint(every=1, model=False)}, max_steps=1)
    assert not list((tmp_path / "run" / "checkpoint-1").glob("*.safetensors"))
    assert (tmp_path / "run" / "checkpoint-1" / "training_state").is_dir()
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 0}, "minutes must be greater than 0 or null, got 0"),
        ({"best": -1}, "best must be at least 0, got -1"),
        ({"mode": "most"}, "mode must be min or max, got 'most'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Checkpoint(**options)
