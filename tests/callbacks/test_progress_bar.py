from __future__ import annotations

import io
import re

import pytest

from bumblebee.callback import Callback
from bumblebee.plotting.panels import ShownMetric
from callbacks import ProgressBar, Validation


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch) -> Terminal:
    """A terminal of 120 columns. Not a fixture: pytest replaces the streams between fixtures and test."""
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "120")
    return screen


def test_lines_show_the_first_and_the_last_step(stub_trainer, capsys):
    stub_trainer([ProgressBar(interval=1000)], steps=6).run()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" · ")[0] for line in lines] == ["step 1/6", "step 6/6"]
    assert re.fullmatch(
        r"step 6/6 · loss 0\.3333 · lr 0\.01 · \S+ ?\w? tokens/s · \S+ ?\w? steps/s · epoch 2 · grad norm 1 · 0:00:00 left",
        lines[-1],
    )


def test_lines_are_printed_at_intervals(stub_trainer, capsys, monkeypatch):
    clock = iter(range(0, 10_000, 10))  # each reading of the clock is ten seconds later
    monkeypatch.setattr("callbacks.progress_bar.time.monotonic", lambda: next(clock))
    stub_trainer([ProgressBar(interval=95)], steps=40).run()
    shown = [int(step) for step in re.findall(r"step (\d+)/40", capsys.readouterr().out)]
    assert shown == [1, 6, 11, 16, 21, 26, 31, 36, 40]  # two readings per step


def test_last_line_is_not_repeated(stub_trainer, capsys):
    stub_trainer([ProgressBar(interval=0)], steps=3).run()
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_time_left_counts_steps_of_this_start_only(stub_trainer, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("callbacks.progress_bar.time.monotonic", lambda: now[0])
    trainer = stub_trainer([ProgressBar()], steps=1000, step=990)
    trainer.call("on_fit_start")
    now[0], trainer.step = 20.0, 991
    trainer.call("on_log", {"loss": 1.0})
    assert "step 991/1,000" in (line := capsys.readouterr().out) and "0:03:00 left" in line


def test_tokens_per_second_exclude_validation_and_saving(stub_trainer, capsys, monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr("callbacks.progress_bar.time.monotonic", lambda: now[0])
    trainer = stub_trainer([ProgressBar(interval=0)], steps=9)
    trainer.call("on_fit_start")
    for trainer.step in range(1, 5):
        now[0] += 1.0
        trainer.tokens += 50
        if trainer.step == 2:
            now[0] += 1000.0
            trainer.call("on_validation_end", {"validation_loss": 1.0})
        trainer.call("on_log", {"loss": 1.0})
        if trainer.step == 3:
            now[0] += 1000.0
            trainer.call("on_checkpoint_saved", tmp_path)
    assert re.findall(r"(\S+) tokens/s", capsys.readouterr().out) == ["50"] * 4


def test_bar_closes_before_other_callbacks_print_at_the_end(stub_trainer, monkeypatch):
    class PrintAtEnd(Callback):
        def on_fit_end(self, trainer):
            print("the end", flush=True)

    screen = terminal(monkeypatch)
    stub_trainer([PrintAtEnd(), ProgressBar(refresh=0)], steps=2).run()
    assert screen.getvalue().endswith("\nthe end\n")


def test_validation_has_its_own_line_in_any_callback_order(stub_trainer, capsys):
    for callbacks in ([ProgressBar(), Validation(at_start=True)], [Validation(at_start=True), ProgressBar()]):
        stub_trainer(callbacks, steps=3).run()
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "validation at step 0: loss 2.5000"
        assert "validation at step 3: loss 2.5000" in lines


def test_terminal_shows_a_bar_with_metrics(stub_trainer, monkeypatch):
    screen = terminal(monkeypatch)
    stub_trainer([ProgressBar(refresh=0), Validation()], steps=3).run()
    text = screen.getvalue()
    assert "3/3 steps" in text and "loss 0.6667" in text and "lr 0.01" in text and "tokens/s" in text
    assert re.search(r"(^|[\r\n])validation at step 3: loss 2\.5000\n", text)
    assert text.endswith("\n")


@pytest.mark.parametrize(("columns", "shown"), [(75, ""), (100, "tokens/s"), (170, "grad norm 1]")])
def test_narrow_terminal_keeps_the_bar_and_the_first_metrics(columns, shown, stub_trainer, monkeypatch):
    screen = terminal(monkeypatch)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (columns, 40))
    stub_trainer([ProgressBar(refresh=0)], steps=3).run()
    last = screen.getvalue().strip("\n").split("\r")[-1]
    assert len(last) <= columns and "loss 0.6667" in last and "#" * 5 in last and last.rstrip().endswith("]") and shown in last


def test_learning_rates_are_never_rounded_to_zero(stub_trainer, capsys):
    trainer = stub_trainer([ProgressBar(interval=0)], steps=9)
    trainer.call("on_fit_start")
    for trainer.step, rate in enumerate((0.0, 2.5e-7, 3e-4, 0.0125), start=1):
        trainer.call("on_log", {"loss": 1.0, "lr": rate})
    assert re.findall(r" lr (\S+)", capsys.readouterr().out) == ["0", "2.5e-07", "0.0003", "0.0125"]


def test_task_names_the_metrics_on_the_console(stub_trainer, capsys):
    trainer = stub_trainer([ProgressBar(interval=0)], steps=2)
    trainer.task.headline = (ShownMetric("rl/reward", "reward"), ShownMetric("rl/truncated", "truncated", fraction=True))
    trainer.task.extra_metrics = {"rl/reward": 0.5, "rl/truncated": 0.256}
    trainer.run()
    assert capsys.readouterr().out.splitlines()[-1].startswith("step 2/2 · reward 0.5000 · truncated 26% · lr 0.01 · ")


def test_bar_of_a_resumed_run_starts_at_its_step(stub_trainer, monkeypatch):
    screen = terminal(monkeypatch)
    stub_trainer([ProgressBar(refresh=0)], steps=10, step=8).run()
    shown = re.findall(r"(\d+)/10 steps", screen.getvalue())
    assert shown[0] == "9" and shown[-1] == "10"


def test_nothing_is_drawn_before_the_first_step(stub_trainer, monkeypatch):
    screen = terminal(monkeypatch)
    bar = ProgressBar(refresh=0)
    stub_trainer([bar]).call("on_fit_start")
    assert screen.getvalue() == ""


def test_exception_closes_the_bar(stub_trainer, monkeypatch):
    screen = terminal(monkeypatch)
    bar = ProgressBar(refresh=0)
    trainer = stub_trainer([bar])
    trainer.call("on_fit_start")
    trainer.step = 1
    trainer.call("on_log", {"loss": 1.0})
    trainer.call("on_save")
    trainer.call("on_exception", RuntimeError())
    before = screen.getvalue()
    trainer.call("on_exception", RuntimeError())
    assert before.endswith("\n") and screen.getvalue() == before


@pytest.mark.parametrize("name", ["refresh", "interval"])
def test_negative_seconds_raise(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        ProgressBar(**{name: -1.0})


def test_real_run_shows_each_step(complete_run, resumed_run):
    assert re.findall(r"step (\d)/6 · loss", complete_run.text) == list("123456")
    assert re.findall(r"step (\d)/6 · loss", resumed_run.text) == list("56")
