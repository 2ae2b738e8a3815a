from __future__ import annotations

import json
import math

import pytest
from helpers.stub_engine import StubData, StubTrainer

from bumblebee.callback import Callback
from bumblebee.checkpoint.trainer_state import checkpoints, read_trainer_state
from callbacks import Checkpoint
from callbacks.checkpoint import delete


def steps(folder):
    return [checkpoint.step for checkpoint in checkpoints(folder)]


def test_saves_every_n_steps_and_marks_the_last(stub_trainer):
    trainer = stub_trainer([Checkpoint(every=4)], steps=10).run()
    assert trainer.events == [("save", 4), ("save", 8), ("save last", 10)]


def test_step_due_for_two_reasons_is_saved_once(stub_trainer):
    assert stub_trainer([Checkpoint(every=3)], steps=6).run().events == [("save", 3), ("save last", 6)]


def test_step_saved_by_another_callback_is_not_saved_again(stub_trainer):
    assert stub_trainer([Checkpoint(every=3), Checkpoint(every=3)], steps=3).run().events == [("save last", 3)]


def test_every_null_saves_only_at_the_end(stub_trainer):
    assert stub_trainer([Checkpoint(every=None)]).run().events == [("save last", 6)]


def test_without_save_last_only_multiples_are_saved(stub_trainer):
    assert stub_trainer([Checkpoint(every=4, save_last=False)], steps=8).run().events == [("save", 4), ("save", 8)]


def test_run_stopped_by_a_callback_saves_its_end(stub_trainer, stop_after):
    assert stub_trainer([Checkpoint(every=100), stop_after(3)]).run().events == [("save last", 3)]


def test_interrupted_run_is_saved_even_without_save_last(stub_trainer, stop_after):
    trainer = stub_trainer([Checkpoint(every=None, save_last=False), stop_after(2, interrupt=True)]).run()
    assert trainer.events == [("save last", 2)]


def test_newest_checkpoints_and_the_last_are_kept(stub_trainer, tmp_path):
    stub_trainer([Checkpoint(every=2, keep=2)], steps=9).run()
    assert steps(tmp_path) == [6, 8, 9]


def test_keep_null_keeps_all(stub_trainer, tmp_path):
    stub_trainer([Checkpoint(every=2, keep=None)], steps=7).run()
    assert steps(tmp_path) == [2, 4, 6, 7]


def test_rotation_includes_checkpoints_of_earlier_runs(stub_trainer, tmp_path, make_checkpoint):
    for step in (2, 4, 6):
        make_checkpoint(tmp_path, step)
    stub_trainer([Checkpoint(every=2, keep=2)], steps=8, step=6).run()
    assert steps(tmp_path) == [4, 6, 8]  # 8 is the last and does not count


def test_last_checkpoint_of_an_extended_run_is_rotated(stub_trainer, tmp_path):
    stub_trainer([Checkpoint(every=2, keep=2)], steps=5).run()
    assert steps(tmp_path) == [2, 4, 5]
    stub_trainer([Checkpoint(every=2, keep=2)], steps=9, step=5).run()
    assert steps(tmp_path) == [6, 8, 9]


def test_later_checkpoints_of_an_earlier_run_are_left_alone(stub_trainer, tmp_path, make_checkpoint):
    for step in (2, 20, 30):
        make_checkpoint(tmp_path, step)
    stub_trainer([Checkpoint(every=1, keep=1, save_last=False)], steps=4, step=2).run()
    assert steps(tmp_path) == [4, 20, 30]


def test_rotation_ignores_incomplete_checkpoints_and_other_files(stub_trainer, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()  # no trainer_state.json
    (tmp_path / "checkpoint-notes.txt").touch()
    stub_trainer([Checkpoint(every=2, keep=1)], steps=6).run()
    assert steps(tmp_path) == [4, 6]
    assert (tmp_path / "checkpoint-1").is_dir() and (tmp_path / "checkpoint-notes.txt").is_file()


def test_failed_save_deletes_nothing(stub_trainer, tmp_path, make_checkpoint):
    make_checkpoint(tmp_path, 1)
    trainer = stub_trainer([Checkpoint(every=1, keep=1)], steps=9, step=1)

    def full_disk(last=False, model=True):
        raise OSError("no space left on device")

    trainer.save_checkpoint = full_disk
    with pytest.raises(OSError, match="no space"):
        trainer.run()
    assert steps(tmp_path) == [1]


def test_killed_deletion_leaves_no_checkpoint(tmp_path, make_checkpoint, monkeypatch):
    path = make_checkpoint(tmp_path, 3)

    def killed(folder):
        if folder.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("callbacks.checkpoint.remove", killed)
        delete(path)
    (left,) = tmp_path.iterdir()
    assert steps(tmp_path) == [] and left.match(".*.partial")  # the trainer removes .*.partial when it starts
    delete(make_checkpoint(tmp_path, 3))  # the remains do not matter
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"every": 0}, {"keep": 0}, {"keep": -1}])
def test_numbers_below_one_are_invalid(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name} must be at least 1 or null, got {value}"):
        Checkpoint(**options)


def test_real_run_can_be_resumed_from_its_checkpoints(complete_run, resumed_run):
    for run in (complete_run, resumed_run):
        assert steps(run.folder) == [2, 4, 6]
        assert [checkpoint.last for checkpoint in checkpoints(run.folder)] == [False, False, True]
    ends = [read_trainer_state(run.folder / "checkpoint-6") for run in (complete_run, resumed_run)]
    assert ends[0]["tokens"] == ends[1]["tokens"]


# -- saving by time -----------------------------------------------------------------------------------------------------


def test_minutes_count_from_the_last_checkpoint(stub_trainer, monkeypatch):
    clock = Clock(monkeypatch)
    callback = Checkpoint(every=7, minutes=1, save_last=False)
    trainer = stub_trainer([clock.ticking(20), callback], steps=13)  # 20 seconds per step
    assert trainer.run().events == [("save", 3), ("save", 6), ("save", 7), ("save", 10), ("save", 13)]


def test_clock_of_rank_0_decides(stub_trainer, monkeypatch):
    clock = Clock(monkeypatch)
    trainer = stub_trainer([clock.ticking(1000), Checkpoint(every=None, minutes=1, save_last=False)], steps=2)
    monkeypatch.setattr(StubTrainer, "is_main", False)
    own, reduce_sums = [], trainer.reduce_sums

    def add_rank_0(sums):
        if set(sums) != {"due"}:
            return reduce_sums(sums)
        own.append(sums["due"])
        return {"due": float(trainer.step == 2)}

    trainer.reduce_sums = add_rank_0
    trainer.save_checkpoint = lambda last=False, model=True: trainer.events.append(("save", trainer.step))
    trainer.save_model = lambda folder: None  # rank 0 writes
    assert trainer.run().events == [("save", 2)]
    assert own == [False, False]


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


# -- best checkpoints ----------------------------------------------------------------------------------------------------------


def best_file(folder):
    return json.loads((folder / "best.json").read_text())


@pytest.mark.parametrize(
    ("mode", "values"),
    [("min", (5.0, 3.0, 4.0, 2.0, 6.0, 2.5)), ("max", (-5.0, -3.0, -4.0, -2.0, -6.0, -2.5))],
)
def test_best_checkpoints_are_saved_and_kept(mode, values, stub_trainer, scripted, tmp_path):
    callback = Checkpoint(every=None, keep=1, best=2, mode=mode, save_last=False)
    trainer = stub_trainer([scripted(*values), callback], steps=6).run()
    assert trainer.events == [("save", 1), ("save", 2), ("save", 3), ("save", 4), ("save", 6)]
    assert steps(tmp_path) == [3, 4, 6]  # 4 and 6 are the best, 3 is the newest of the others
    assert best_file(tmp_path) == {"checkpoint": "checkpoint-4", "metric": "validation_loss", "value": values[3]}


def test_rotation_keeps_the_best(stub_trainer, scripted, tmp_path):
    stub_trainer([scripted(1.0, 2.0, 3.0), Checkpoint(every=1, keep=1, best=2, save_last=False)], steps=9).run()
    assert steps(tmp_path) == [1, 2, 9]


def test_former_best_checkpoint_is_rotated(stub_trainer, scripted, tmp_path):
    values = (9.0, 8.0, 7.0, 6.0, 5.0)
    stub_trainer([scripted(*values), Checkpoint(every=None, keep=2, best=1, save_last=False)], steps=5).run()
    assert steps(tmp_path) == [3, 4, 5]


def test_older_checkpoint_wins_a_tie(stub_trainer, scripted, tmp_path):
    trainer = stub_trainer([scripted(2.0, 1.0, 1.0, 1.0), Checkpoint(every=None, best=2, save_last=False)], steps=4).run()
    assert trainer.events == [("save", 1), ("save", 2), ("save", 3)]  # step 4 ties with both
    assert best_file(tmp_path)["checkpoint"] == "checkpoint-2"


def test_value_of_a_checkpoint_is_from_its_own_step(stub_trainer, scripted, tmp_path):
    stub_trainer([scripted(None, 1.0, None, 3.0), Checkpoint(every=3, keep=1, best=3, save_last=False)], steps=6).run()
    assert steps(tmp_path) == [2, 4, 6]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_value_is_never_the_best(value, stub_trainer, scripted, tmp_path):
    trainer = stub_trainer([scripted(value, 3.0, value), Checkpoint(every=None, best=3, save_last=False)], steps=3).run()
    assert trainer.events == [("save", 2)]


def test_order_of_callbacks_does_not_matter(stub_trainer, scripted, tmp_path):
    stub_trainer([Checkpoint(every=None, best=1, save_last=False), scripted(3.0, 1.0, 2.0)], steps=3).run()
    assert best_file(tmp_path)["checkpoint"] == "checkpoint-2"


def test_unknown_metric_error_lists_known_metrics(stub_trainer, scripted):
    with pytest.raises(ValueError, match="Checkpoint: unknown metric 'accuracy'; validation reports validation_loss"):
        stub_trainer([scripted(1.0), Checkpoint(best=1, metric="accuracy")]).run()


def test_best_needs_validation_samples(stub_trainer):
    with pytest.raises(ValueError, match="Checkpoint needs validation samples"):
        stub_trainer([Checkpoint(best=1)], data=StubData(num_validation=0))  # when it is set up
    stub_trainer([Checkpoint()], data=StubData(num_validation=0)).run()  # not needed without best


def test_new_run_forgets_the_best_of_an_earlier_one(stub_trainer, scripted, tmp_path):
    (tmp_path / "best.json").write_text("{}")
    trainer = stub_trainer([Checkpoint(every=None, best=1, save_last=False)], steps=1).run()
    assert trainer.events == [] and not (tmp_path / "best.json").exists()


VALUES = (4.0, 2.0, 3.0, 1.0, 5.0, 2.5)


def by_best(**changes):
    return Checkpoint(**{"every": 3, "keep": 1, "best": 2, "save_last": False, **changes})


def test_resumed_run_keeps_the_ranking(fit, scripted, fail_after, tmp_path):
    fit(tmp_path / "whole", {"values": scripted(*VALUES), "checkpoint": by_best()})
    fit(tmp_path / "run", {"values": scripted(*VALUES), "checkpoint": by_best(), "fail": fail_after(3)})
    assert steps(tmp_path / "run") == [1, 2, 3] and best_file(tmp_path / "run")["checkpoint"] == "checkpoint-2"
    run = fit(tmp_path / "run", {"values": scripted(*VALUES), "checkpoint": by_best()}, resume="auto")
    assert run.error is None
    assert steps(tmp_path / "run") == steps(tmp_path / "whole") == [2, 4, 6]
    assert best_file(tmp_path / "run") == best_file(tmp_path / "whole")
    assert best_file(tmp_path / "run") == {"checkpoint": "checkpoint-4", "metric": "validation_loss", "value": 1.0}
    state = read_trainer_state(tmp_path / "run" / "checkpoint-4")["callbacks"]["checkpoint"]
    assert state["best"] == [[4, 1.0], [2, 2.0]]  # the checkpoint includes itself


def test_ranking_is_that_of_the_resumed_checkpoint(fit, scripted, tmp_path):
    fit(tmp_path / "run", {"values": scripted(*VALUES), "checkpoint": by_best()})
    worse = (None,) * 2 + (9.0,) * 4
    checkpoint = tmp_path / "run" / "checkpoint-2"
    fit(
        tmp_path / "run",
        {"values": scripted(*worse), "checkpoint": by_best(best=1)},
        resume=str(checkpoint),
        max_steps=3,
    )
    assert best_file(tmp_path / "run")["checkpoint"] == "checkpoint-2" and 2 in steps(tmp_path / "run")


def test_resumed_without_best_leaves_no_stale_file(stub_trainer, scripted, tmp_path):
    stub_trainer([scripted(1.0), Checkpoint(every=1, keep=1, best=1)], steps=2).run()
    assert best_file(tmp_path)["checkpoint"] == "checkpoint-1"
    stub_trainer([scripted(), Checkpoint(every=1, keep=1)], steps=4, step=2).run()
    assert not (tmp_path / "best.json").exists() and 1 not in steps(tmp_path)


def test_deleted_best_checkpoint_is_forgotten(fit, scripted, tmp_path):
    uses = {"values": scripted(1.0, 3.0, None, 2.0), "checkpoint": by_best(keep=None, every=2)}
    fit(tmp_path / "run", uses, max_steps=2)
    delete(tmp_path / "run" / "checkpoint-1")
    fit(tmp_path / "run", uses, resume="auto", max_steps=4)
    assert best_file(tmp_path / "run") == {"checkpoint": "checkpoint-4", "metric": "validation_loss", "value": 2.0}


def test_ranking_of_another_metric_or_mode_is_forgotten():
    old = {"metric": "validation_loss", "mode": "min", "best": [[4, 1.0], [2, 2.0]]}
    for callback, kept in ((by_best(best=1), [[4, 1.0]]), (by_best(mode="max"), []), (by_best(metric="accuracy"), [])):
        callback.load_state_dict(old)
        assert callback.state_dict()["best"] == kept
    by_best().load_state_dict({})  # of a checkpoint saved by a version without this state


def test_model_false_saves_only_the_training_state(fit, tmp_path):
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
def test_invalid_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        Checkpoint(**options)
