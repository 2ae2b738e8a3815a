from __future__ import annotations

import math

import pytest

from callbacks import Checkpoint, EarlyStopping


def last_step(stub_trainer, scripted, callback, *values, steps=10):
    return stub_trainer([scripted(*values), callback], steps=steps).run().step


def test_stops_after_patience_validations_without_improvement(stub_trainer, scripted, capsys):
    values = (5.0, 4.0, 4.5, 3.0, 3.5, 3.0, 4.0, 1.0)
    assert last_step(stub_trainer, scripted, EarlyStopping(patience=3), *values) == 7
    message = "early stopping: validation_loss did not improve in 3 validations (best 3.0000)\n"
    assert capsys.readouterr().out == message


def test_steps_without_a_validation_do_not_count(stub_trainer, scripted):
    assert last_step(stub_trainer, scripted, EarlyStopping(patience=2), 1.0, None, 2.0, None, None, 2.0, None) == 6


def test_max_mode_prefers_higher_values(stub_trainer, scripted):
    assert last_step(stub_trainer, scripted, EarlyStopping(patience=2, mode="max"), 1.0, 2.0, 1.5, 3.0, 2.0, 3.0, 9.0) == 6


def test_improvement_must_exceed_min_delta(stub_trainer, scripted):
    values = (2.0, 1.75, 1.5, 0.75, 0.5)  # improvements on 2.0 of 0.25, 0.5 and 1.25, then one of 0.25 on 0.75
    assert last_step(stub_trainer, scripted, EarlyStopping(patience=3, min_delta=0.5), *values, steps=6) == 6
    assert last_step(stub_trainer, scripted, EarlyStopping(patience=2, min_delta=0.5), *values) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_value_is_not_an_improvement(value, stub_trainer, scripted, capsys):
    assert last_step(stub_trainer, scripted, EarlyStopping(patience=2), value, value, 1.0) == 2
    assert "did not improve in 2 validations (no finite value yet)" in capsys.readouterr().out


def test_unknown_metric_error_lists_known_metrics(fit, tmp_path):
    from callbacks import Validation

    run = fit(tmp_path / "run", {"stop": EarlyStopping(metric="accuracy"), "validation": Validation(every=1)})
    assert isinstance(run.error, ValueError)
    named = "EarlyStopping: unknown metric 'accuracy'; validation reports validation_loss, validation_perplexity"
    assert named in str(run.error)


def test_validation_samples_are_required(fit, tmp_path):
    run = fit(tmp_path / "run", {"stop": EarlyStopping()}, num_validation=0)
    assert isinstance(run.error, ValueError) and "data.validation_ratio or data.validation_files" in str(run.error)


def test_resumed_run_continues_counting(fit, scripted, fail_after, tmp_path):
    def uses():
        values = scripted(1.0, 2.0, 3.0, 4.0, 5.0)
        return {"values": values, "stop": EarlyStopping(patience=3), "checkpoint": Checkpoint(every=1)}

    fit(tmp_path / "run", {**uses(), "fail": fail_after(3)})  # two without improvement
    run = fit(tmp_path / "run", uses(), resume="auto")
    assert run.trainer.step == 4 and "did not improve in 3 validations (best 1.0000)" in run.text


def test_state_of_another_metric_or_mode_is_ignored():
    state = {"metric": "validation_loss", "mode": "min", "best": 1.0, "in_vain": 2}
    for callback, best in ((EarlyStopping(), 1.0), (EarlyStopping(mode="max"), None), (EarlyStopping("accuracy"), None)):
        callback.load_state_dict(state)
        assert callback.state_dict()["best"] == best


def test_second_run_of_the_same_object_starts_over(stub_trainer, scripted):
    callback = EarlyStopping(patience=1)
    assert last_step(stub_trainer, scripted, callback, 1.0, 2.0) == 2
    assert last_step(stub_trainer, scripted, callback, 3.0, 2.5, 2.0, 2.0) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"min_delta": -1.0}, "min_delta must be at least 0, got -1.0"),
        ({"mode": "least"}, "mode must be min or max, got 'least'"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        EarlyStopping(**options)
