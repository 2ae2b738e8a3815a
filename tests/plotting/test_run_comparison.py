from __future__ import annotations

import json
from pathlib import Path

import pytest

from bumblebee.cli.main import main
from bumblebee.plotting.curves import is_smoothed, plot_runs, smooth
from bumblebee.plotting.run_comparison import LoggedRun, RunComparison


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Two runs of four steps, validated after two; the last line of the second is truncated."""
    for name, slope in (("wide", 1.0), ("deep", 0.5)):
        lines = [{"step": n, "epoch": n / 4, "loss": 4 - slope * n, "tokens": 100 * n, "seconds": 0.5 * n} for n in range(1, 5)]
        lines.insert(2, {"step": 2, "epoch": 0.5, "validation_loss": 3 - slope, "seconds": 1.1})
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (tmp_path / "deep" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')
    return [str(tmp_path / "wide"), str(tmp_path / "deep")]


def test_panels_have_training_and_validation_values(runs):
    (curves,) = RunComparison(runs, smoothing=0.5).panels().values()
    wide, deep = curves
    assert (wide.name, deep.name) == ("wide", "deep")
    assert wide.x == [1, 2, 3, 4] and wide.values == [3.0, 2.0, 1.0, 0.0]
    assert deep.validation == ([2], [2.5])


@pytest.mark.parametrize(("along", "x", "validation_x"), [("tokens", [100, 200, 300, 400], [200]), ("epoch", None, [0.5])])
def test_validation_is_at_the_position_of_its_step(runs, along, x, validation_x):
    (curves,) = RunComparison(runs, along=along).panels().values()
    assert curves[0].x == (x or [0.25, 0.5, 0.75, 1.0])
    assert curves[0].validation[0] == validation_x


def test_rewards_are_compared_by_default_and_the_highest_is_best(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lines = [{"step": n, "loss": 0.0, "rl/reward": n / 4, "validation_rl/reward": [0.5, 0.75, 0.25][n]} for n in range(3)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    comparison = RunComparison([str(tmp_path / "one"), str(tmp_path / "two")], smoothing=0.0)
    assert list(comparison.panels()) == ["rl/reward"]
    assert comparison.table().splitlines()[1].split()[-2:] == ["0.5000", "0.7500"]
    (tmp_path / "two" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    assert list(RunComparison([str(tmp_path / "one"), str(tmp_path / "two")]).panels()) == ["loss"]


def test_null_values_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 2, "loss": 1.5}\n{"step": 3}\n')
    assert LoggedRun.read(tmp_path).column("loss", "step") == ([2], [1.5])


def test_names_are_the_shortest_distinct_path_suffixes(runs, tmp_path):
    (tmp_path / "other").mkdir()
    (Path(runs[0])).rename(tmp_path / "other" / "deep")
    names = RunComparison([str(tmp_path / "other" / "deep"), runs[1]]).names
    assert names == ["other/deep", f"{tmp_path.name}/deep"]


def test_plot_command_writes_a_picture_and_prints_a_table(runs, tmp_path, capsys):
    for ending, begin in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        main(["plot", *runs, "--output", str(tmp_path / f"new/two.{ending}"), "--smoothing", "0"])
        assert (tmp_path / f"new/two.{ending}").read_bytes().startswith(begin)
    head, wide, deep = capsys.readouterr().out.splitlines()[:3]
    assert head.split("  ")[0] == "run" and "best validation_loss" in head
    assert wide.split() == ["wide", "4", "400", "0:00:02", "0.0000", "2.0000"]
    assert deep.split() == ["deep", "4", "400", "0:00:02", "2.0000", "2.5000"]


def test_learning_rates_are_not_smoothed(runs):
    comparison = RunComparison(runs, ("loss", "tokens"), smoothing=0.9)
    figure = plot_runs(comparison.panels(), "optimizer steps", True, 0.9)
    losses, tokens = figure.axes
    labels = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert labels == [["wide", "deep", "smoothed (0.9)", "logged", "validation"], ["wide", "deep"]]
    assert list(tokens.lines[0].get_ydata()) == [100, 200, 300, 400]
    assert list(losses.lines[1].get_ydata()) == smooth([3.0, 2.0, 1.0, 0.0], 0.9)
    assert not is_smoothed("lr") and is_smoothed("rewards/accuracies")


def test_table_labels_smoothed_values(runs):
    head, wide, _ = RunComparison(runs, ("loss", "tokens"), smoothing=0.9).table().splitlines()
    assert "  loss (smoothed 0.9)  best validation_loss  tokens" in head and wide.split()[-1] == "400"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{wide}x"], "is not a run: it has no metrics.jsonl (did you mean"),
        (["{wide}", "--metrics", "los"], "no run has 'los' (did you mean 'loss'"),
        (["{wide}", "--output", "{wide}/a.doc"], "is not a picture file; use .png"),
        (["{wide}", "--smoothing", "1"], "smoothing must be in [0, 1), got 1.0"),
        (["{wide}", "--along", "minutes"], "along"),
        ([], "missing required argument 'runs'"),
    ],
)
def test_invalid_arguments_are_one_line_errors_and_write_nothing(runs, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(["plot", *(word.replace("{wide}", runs[0]) for word in words)])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message in line
    assert sorted(tmp_path.rglob("*")) == before
