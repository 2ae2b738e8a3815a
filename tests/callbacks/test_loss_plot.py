from __future__ import annotations

import math

import pytest

from bumblebee.plotting.curves import smooth
from bumblebee.plotting.panels import Panel, ShownMetric
from bumblebee.plotting.run_plot import CurvePoints, plot_run
from bumblebee.tasks.preference_task import PreferenceTask
from callbacks import LossPlot

PNG = b"\x89PNG\r\n\x1a\n"
LOSS = ShownMetric("loss", "loss")
ACCURACY, MARGIN = PreferenceTask.panels[1].metrics


def columns(plot, metric="loss"):
    """Steps, values, averages and spreads that a LossPlot keeps."""
    return plot.state_dict()["curves"][metric]["series"]["columns"]


def test_picture_is_written_during_the_run_without_other_files(stub_trainer, tmp_path):
    trainer = stub_trainer([LossPlot(every=2)])
    trainer.call("on_fit_start")
    for trainer.step in (1, 2):
        assert list(tmp_path.iterdir()) == []
        trainer.call("on_log", {"loss": 2.0, "lr": 0.1})
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_drawn_every_n_steps_and_at_the_end(stub_trainer, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        LossPlot, "_draw", lambda self, trainer: drawn.append(trainer.step) or setattr(self, "_drawn_at", trainer.step)
    )
    stub_trainer([LossPlot(every=4)], steps=10).run()
    assert drawn == [4, 8, 10]


def test_plot_has_losses_validation_and_learning_rate():
    loss = CurvePoints(ShownMetric("loss", "loss", axis="loss (nats per token)"), [1, 2], [3.0, 2.0], [3.0, 2.5])
    loss.validation[0].append(2), loss.validation[1].append(2.2)
    figure = plot_run([[loss]], ([1, 2], [0.1, 0.2]), smoothing=0.9)
    losses, rate = figure.axes
    assert [list(line.get_ydata()) for line in losses.lines] == [[3.0, 2.0], [3.0, 2.5], [2.2]]
    assert losses.lines[0].get_linewidth() < losses.lines[1].get_linewidth()
    assert list(rate.lines[0].get_ydata()) == [0.1, 0.2]
    assert (losses.get_xlabel(), losses.get_ylabel()) == ("optimizer steps", "loss (nats per token)")


def test_no_smoothing_and_no_validation_gives_one_curve():
    figure = plot_run([[CurvePoints(LOSS, [1, 2], [3.0, 2.0], [3.0, 2.0])]], ([1, 2], [0.1, 0.2]), smoothing=0.0)
    assert len(figure.axes[0].lines) == 1


def test_moving_average_is_bias_corrected(stub_trainer):
    plot = LossPlot(smoothing=0.5)
    trainer = stub_trainer([plot])
    for loss in (4.0, 1.0, 7.0):
        trainer.call("on_log", {"loss": loss, "lr": 0.1})
    a, b = 2 / 11, 3 / 12  # weights of earlier values, before they reach 0.5
    second = (a * 0.9 * 4 + (1 - a) * 1) / (1 - 0.1 * a)
    third = (b * (1 - 0.1 * a) * second + (1 - b) * 7) / (1 - 0.1 * a * b)
    expected = [4.0, second, third]
    assert columns(plot)[2] == pytest.approx(expected)


@pytest.mark.parametrize("steps", [12, 50, 1000])
def test_smoothed_curve_ends_near_the_falling_loss(steps):
    losses = [7 + 5 * math.exp(-3 * step / steps) for step in range(steps)]
    assert losses[-1] < smooth(losses, 0.9)[-1] < losses[-1] + 0.2


def test_average_of_a_long_run_is_the_exponential_one():
    noise = [math.sin(step * step) for step in range(2000)]
    averages = smooth(noise, 0.9)
    assert averages[-1] == pytest.approx(0.9 * averages[-2] + 0.1 * noise[-1])


def test_non_finite_losses_are_left_out(stub_trainer, tmp_path):
    plot = LossPlot()
    trainer = stub_trainer([plot])
    for loss in (4.0, math.nan, math.inf, 3.0):
        trainer.call("on_log", {"loss": loss, "lr": 0.1})
    trainer.call("on_log", {"lr": 0.1})  # a step without targets
    assert columns(plot)[1] == [4.0, 3.0]


def test_downsampling_is_even_and_keeps_the_average(stub_trainer, monkeypatch):
    def curve(limit):
        monkeypatch.setattr("callbacks.loss_plot._MAX_POINTS", limit)
        plot = LossPlot(every=10_000)
        trainer = stub_trainer([plot])
        for step in range(1, 1001):
            trainer.step = step
            trainer.call("on_log", {"loss": math.sin(step), "lr": 0.1})
        return columns(plot)

    downsampled, full = curve(50), curve(10_000)
    steps = downsampled[0]
    assert 25 <= len(steps) <= 50
    assert {b - a for a, b in zip(steps, steps[1:], strict=False)} == {32}
    kept = dict(zip(full[0], full[2], strict=True))
    assert downsampled[2] == [kept[step] for step in steps]


def test_resumed_run_continues_the_curve(resumed_run, complete_run):
    assert resumed_run.callbacks["plot"].state_dict() == complete_run.callbacks["plot"].state_dict()
    plot = complete_run.callbacks["plot"]
    assert columns(plot)[0] == [1, 2, 3, 4, 5, 6]
    assert plot.state_dict()["validations"]["loss"]["columns"][0] == [0, 3, 6]


def test_state_is_a_copy(stub_trainer):
    plot = LossPlot()
    trainer = stub_trainer([plot])
    trainer.call("on_log", {"loss": 1.0, "lr": 0.1})
    state = plot.state_dict()
    trainer.call("on_log", {"loss": 1.0, "lr": 0.1})
    assert len(state["curves"]["loss"]["series"]["columns"][0]) == 1


def test_second_run_starts_with_an_empty_picture(stub_trainer):
    plot = LossPlot()
    for _ in range(2):
        stub_trainer([plot]).run()
    assert columns(plot)[0] == [1, 2, 3, 4, 5, 6]


def test_real_run_writes_a_picture(complete_run):
    assert (complete_run.folder / "loss.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(("options", "message"), [
    ({"every": 0}, "every must be at least 1, got 0"),
    ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\), got 1.0"),
])  # fmt: skip
def test_invalid_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        LossPlot(**options)


def test_two_metrics_of_a_panel_have_an_axis_each():
    accuracy = CurvePoints(ACCURACY, [1, 2], [0.5, 0.75], [0.5, 0.7], validation=([2], [0.6]))
    margin = CurvePoints(MARGIN, [1, 2], [0.0, 0.1], [0.0, 0.08], validation=([2], [0.05]))
    loss = CurvePoints(LOSS, [1, 2], [0.7, 0.6], [0.7, 0.65], validation=([2], [0.6]))
    figure = plot_run([[loss], [accuracy, margin]], ([1, 2], [0.1, 0.1]), 0.9)
    losses, _, accuracies, margins = figure.axes
    assert [list(line.get_ydata()) for line in accuracies.lines] == [[0.5, 0.75], [0.5, 0.7], [0.6]]
    assert [list(line.get_ydata()) for line in margins.lines] == [[0.0, 0.1], [0.0, 0.08], [0.05]]
    assert (losses.get_ylabel(), accuracies.get_ylabel(), margins.get_ylabel()) == ("loss", "reward accuracy", "reward margin")
    labels = [text.get_text() for text in accuracies.get_legend().get_texts()]
    assert labels == [f"{name}{kind}" for name in ("accuracy", "margin") for kind in ("", ", smoothed (0.9)", ", validation")]
    figure.canvas.draw()
    for axes in figure.axes:
        if legend := axes.get_legend():  # covers no curve
            box = legend.get_window_extent()
            assert box.y0 >= axes.bbox.y1 - 1 and box.x1 <= figure.bbox.x1


def test_spread_is_a_band_around_the_average():
    reward = CurvePoints(ShownMetric("rl/reward", "reward"), [1, 2], [0.5, 1.0], [0.5, 0.75], [0.25, 0.5])
    axes = plot_run([[reward]], ([1, 2], [0.1, 0.2]), 0.9).axes[0]
    (band,) = axes.collections
    assert band.get_datalim(axes.transData).intervaly.tolist() == [0.25, 1.25]


def test_panels_are_those_of_the_task_that_are_logged(stub_trainer, monkeypatch):
    drawn = []
    monkeypatch.setattr("callbacks.loss_plot.plot_run", lambda panels, *_: drawn.append(panels) or plot_run(panels, *_))
    reward, length, kl = (ShownMetric(name, name, spread=f"{name}_spread") for name in ("reward", "length", "kl"))
    plot = LossPlot()
    trainer = stub_trainer([plot])
    trainer.task.panels = (Panel(reward), Panel(kl, length), Panel(kl))
    trainer.task.extra_metrics = {"reward": 0.75, "reward_spread": 0.25, "length": 3.0}
    trainer.run()
    trainer.call("on_validation_end", {"validation_reward": 0.5})
    again = LossPlot()
    again.load_state_dict(plot.state_dict())
    again.on_fit_end(trainer)
    for panels in drawn:
        assert [[curve.metric.name for curve in panel] for panel in panels] == [["reward"], ["length"]]
        assert panels[0][0].values == [0.75] * 6 and panels[0][0].spread == pytest.approx([0.25] * 6)
        assert panels[1][0].values == [3.0] * 6 and panels[1][0].spread == []
    assert [panels[0][0].validation for panels in drawn] == [([], []), ([6], [0.5])]


def test_state_of_an_earlier_version_keeps_the_loss():
    series = {"columns": [[1, 2], [3.0, 2.0], [3.0, 2.5], [0.1, 0.2]], "stride": 1, "seen": 2}
    old = {"training": series, "validation": {"columns": [[2], [2.5]], "stride": 1, "seen": 1},
           "average": {"total": 2.0, "weight": 0.9, "count": 2}, "rewards": {"columns": [[], [], []]}}  # fmt: skip
    plot = LossPlot()
    plot.load_state_dict(old)
    assert columns(plot) == [[1, 2], [3.0, 2.0], [3.0, 2.5], [0.0, 0.0]]
    state = plot.state_dict()
    assert state["curves"]["loss"]["average"] == old["average"] and state["learning rate"]["columns"] == [[1, 2], [0.1, 0.2]]
    assert state["validations"]["loss"]["columns"] == [[2], [2.5]]
