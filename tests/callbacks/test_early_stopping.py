from __future__ import annotations

import math

import pytest

from callbacks import Checkpoint, EarlyStopping


def last_step(fake, scripted, callback, *values, steps=10):
    return fake([scripted(*values), callback], steps=steps).run().step


def test_it_stops_when_so_many_validations_in_a_row_bring_nothing(fake, scripted, capsys):
    values = (5.0, 4.0, 4.5, 3.0, 3.5, 3.0, 4.0, 1.0)
    assert last_step(fake, scripted, EarlyStopping(patience=3), *values) == 7
    said = "early stopping: validation_loss did not improve in 3 validations (best 3.0000)\n"
    assert capsys.readouterr().out == said


def test_steps_without_a_validation_do_not_count(fake, scripted):
    assert last_step(fake, scripted, EarlyStopping(patience=2), 1.0, None, 2.0, None, None, 2.0, None) == 6


def test_max_wants_larger_values(fake, scripted):
    assert last_step(fake, scripted, EarlyStopping(patience=2, mode="max"), 1.0, 2.0, 1.5, 3.0, 2.0, 3.0, 9.0) == 6


def test_an_improvement_must_be_more_than_min_delta(fake, scripted):
    values = (2.0, 1.75, 1.5, 0.75, 0.5)  # on 2.0 by 0.25, by 0.5, by 1.25; then by 0.25
    assert last_step(fake, scripted, EarlyStopping(patience=3, min_delta=0.5), *values, steps=6) == 6
    assert last_step(fake, scripted, EarlyStopping(patience=2, min_delta=0.5), *values) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_no_improvement(value, fake, scripted, capsys):
    assert last_step(fake, scripted, EarlyStopping(patience=2), value, value, 1.0) == 2
    assert "did not improve in 2 validations (no finite value yet)" in capsys.readouterr().out


def test_a_metric_that_is_not_measured_is_refused_with_those_that_are(fit, tmp_path):
    from callbacks import Validation

    run = fit(tmp_path / "run", {"stop": EarlyStopping(metric="accuracy"), "validation": Validation(every=1)})
    assert isinstance(run.error, ValueError)
    named = "EarlyStopping: unknown metric 'accuracy'; validation reports validation_loss, validation_perplexity"
    assert named in str(run.error)


def test_nothing_held_out_is_refused(fit, tmp_path):
    run = fit(tmp_path / "run", {"stop": EarlyStopping()}, held_out=0)
    assert isinstance(run.error, ValueError) and "data.validation_ratio or data.validation_files" in str(run.error)


def test_a_resumed_run_goes_on_counting(fit, scripted, fail_after, tmp_path):
    def uses():
        values = scripted(1.0, 2.0, 3.0, 4.0, 5.0)
        return {"values": values, "stop": EarlyStopping(patience=3), "checkpoint": Checkpoint(every=1)}

    fit(tmp_path / "run", {**uses(), "fail": fail_after(3)})  # two in vain
    run = fit(tmp_path / "run", uses(), resume="auto")
    assert run.trainer.step == 4 and "did not improve in 3 validations (best 1.0000)" in run.text


def test_what_was_counted_for_another_metric_or_mode_is_forgotten():
    state = {"metric": "validation_loss", "mode": "min", "best": 1.0, "in_vain": 2}
    for callback, best in ((EarlyStopping(), 1.0), (EarlyStopping(mode="max"), None), (EarlyStopping("accuracy"), None)):
        callback.load_state_dict(state)
        assert callback.state_dict()["best"] == best


def test_a_second_run_of_the_same_object_begins_anew(fake, scripted):
    callback = EarlyStopping(patience=1)
    assert last_step(fake, scripted, callback, 1.0, 2.0) == 2
    assert last_step(fake, scripted, callback, 3.0, 2.5, 2.0, 2.0) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"min_delta": -1.0}, "min_delta must be at least 0, got -1.0"),
        ({"mode": "least"}, "mode must be min or max, got 'least'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EarlyStopping(**options)
