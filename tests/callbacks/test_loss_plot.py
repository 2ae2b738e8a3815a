from __future__ import annotations

import math

import pytest

from callbacks import LossPlot
from callbacks.loss_plot import plot_run

PNG = b"\x89PNG\r\n\x1a\n"


def test_a_picture_is_there_while_the_run_goes_on_and_nothing_beside_it(fake, tmp_path):
    trainer = fake([LossPlot(every=2)])
    trainer.call("on_fit_start")
    for trainer.step in (1, 2):
        assert list(tmp_path.iterdir()) == []
        trainer.call("on_log", {"loss": 2.0, "lr": 0.1})
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_it_is_drawn_every_n_steps_and_at_the_end(fake, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        LossPlot, "_draw", lambda self, trainer: drawn.append(trainer.step) or setattr(self, "_drawn_at", trainer.step)
    )
    fake([LossPlot(every=4)], steps=10).run()
    assert drawn == [4, 8, 10]


def test_the_picture_has_raw_and_smoothed_losses_validations_and_the_learning_rate():
    figure = plot_run([[1, 2], [3.0, 2.0], [3.0, 2.5], [0.1, 0.2]], [[2], [2.2]], smoothing=0.9)
    losses, rate = figure.axes
    assert [list(line.get_ydata()) for line in losses.lines] == [[3.0, 2.0], [3.0, 2.5], [2.2]]
    assert losses.lines[0].get_linewidth() < losses.lines[1].get_linewidth()
    assert list(rate.lines[0].get_ydata()) == [0.1, 0.2]
    assert (losses.get_xlabel(), losses.get_ylabel()) == ("optimizer steps", "loss (nats per token)")


def test_without_smoothing_and_validations_there_is_one_curve():
    figure = plot_run([[1, 2], [3.0, 2.0], [3.0, 2.0], [0.1, 0.2]], [[], []], smoothing=0.0)
    assert len(figure.axes[0].lines) == 1


def test_the_average_is_right_from_the_first_value_on(fake):
    plot = LossPlot(smoothing=0.5)
    trainer = fake([plot])
    for loss in (4.0, 1.0, 7.0):
        trainer.call("on_log", {"loss": loss, "lr": 0.1})
    expected = [4.0, (0.5 * 4 + 1) / 1.5, (0.25 * 4 + 0.5 * 1 + 7) / 1.75]
    assert plot.state_dict()["training"]["columns"][2] == pytest.approx(expected)


def test_losses_that_are_not_finite_leave_a_gap(fake, tmp_path):
    plot = LossPlot()
    trainer = fake([plot])
    for loss in (4.0, math.nan, math.inf, 3.0):
        trainer.call("on_log", {"loss": loss, "lr": 0.1})
    trainer.call("on_log", {"lr": 0.1})  # steps without any target
    assert plot.state_dict()["training"]["columns"][1] == [4.0, 3.0]


def test_long_runs_are_thinned_evenly_and_the_average_stays_the_same(fake, monkeypatch):
    def curve(limit):
        monkeypatch.setattr("callbacks.loss_plot._MAX_POINTS", limit)
        plot = LossPlot(every=10_000)
        trainer = fake([plot])
        for step in range(1, 1001):
            trainer.step = step
            trainer.call("on_log", {"loss": math.sin(step), "lr": 0.1})
        return plot.state_dict()["training"]["columns"]

    thin, full = curve(50), curve(10_000)
    steps = thin[0]
    assert 25 <= len(steps) <= 50
    assert {b - a for a, b in zip(steps, steps[1:], strict=False)} == {32}
    kept = dict(zip(full[0], full[2], strict=True))
    assert thin[2] == [kept[step] for step in steps]


def test_a_resumed_run_continues_the_curve(continued, whole):
    assert continued.callbacks["plot"].state_dict() == whole.callbacks["plot"].state_dict()
    state = whole.callbacks["plot"].state_dict()
    assert state["training"]["columns"][0] == [1, 2, 3, 4, 5, 6] and state["validation"]["columns"][0] == [0, 3, 6]


def test_its_state_is_a_copy(fake):
    plot = LossPlot()
    trainer = fake([plot])
    trainer.call("on_log", {"loss": 1.0, "lr": 0.1})
    state = plot.state_dict()
    trainer.call("on_log", {"loss": 1.0, "lr": 0.1})
    assert len(state["training"]["columns"][0]) == 1


def test_a_second_run_from_the_start_has_an_empty_picture(fake):
    plot = LossPlot()
    for _ in range(2):
        fake([plot]).run()
    assert plot.state_dict()["training"]["columns"][0] == [1, 2, 3, 4, 5, 6]


def test_a_real_run_leaves_a_picture(whole):
    assert (whole.folder / "loss.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(("options", "message"), [
    ({"every": 0}, "every must be at least 1, got 0"),
    ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\), got 1.0"),
])  # fmt: skip
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LossPlot(**options)


def test_preferences_have_a_second_panel_with_accuracies_and_margins(fake):
    training = [[1, 2], [0.7, 0.6], [0.7, 0.65], [0.1, 0.1]]
    figure = plot_run(training, [[], []], 0.9, rewards=[[1, 2], [0.5, 0.75], [0.0, 0.1]])
    losses, _, accuracies, margins = figure.axes
    assert list(accuracies.lines[0].get_ydata()) == [0.5, 0.75] and list(margins.lines[0].get_ydata()) == [0.0, 0.1]
    assert losses.get_ylabel() == "loss"


def test_rewards_that_are_logged_are_drawn_and_survive_a_resume(fake):
    plot = LossPlot()
    trainer = fake([plot])
    trainer.metrics = {"rewards/accuracies": 0.75, "rewards/margins": 0.2}
    trainer.run()
    again = LossPlot()
    again.load_state_dict(plot.state_dict())
    assert again.state_dict()["rewards"]["columns"] == [[1, 2, 3, 4, 5, 6], [0.75] * 6, [0.2] * 6]


def test_a_checkpoint_from_before_there_were_rewards_is_continued():
    old = {name: part for name, part in LossPlot().state_dict().items() if name != "rewards"}
    LossPlot().load_state_dict(old)
