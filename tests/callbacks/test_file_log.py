from __future__ import annotations

import logging
import re

import pytest

from callbacks import FileLog, RunSummary


def messages(folder):
    return [line[27:] for line in (folder / "log.txt").read_text().splitlines()]


def test_lines_begin_with_a_timestamp(complete_run):
    for line in (complete_run.folder / "log.txt").read_text().splitlines():
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d +\S", line)


def test_run_is_logged_from_start_to_end(complete_run):
    lines = messages(complete_run.folder)
    assert lines[0] == "start: 6 steps on 1 x cpu"
    logged = [line for line in lines if line.startswith(("validation at", "step "))]
    assert logged[0].startswith("validation at step 0: loss ") and logged[1].startswith("step 1 · epoch 0.3636 · loss ")
    assert f"checkpoint: {complete_run.folder / 'checkpoint-4'}" in lines
    assert any(line.startswith("finished: step 6/6, ") for line in lines[-2:])


def test_log_has_what_the_run_printed(complete_run):
    lines = messages(complete_run.folder)
    printed = [line for line in complete_run.text.splitlines() if not line.startswith(("step ", "validation at"))]
    assert printed[0].startswith("Bumblebee ") and printed[-1].startswith("finished at step 6/6")
    assert [line for line in lines if line in printed] == printed


def test_order_of_callbacks_does_not_matter(stub_trainer, tmp_path):
    stub_trainer([RunSummary(), FileLog()], steps=2).run()
    first = messages(tmp_path)
    (tmp_path / "log.txt").unlink()
    stub_trainer([FileLog(), RunSummary()], steps=2).run()
    assert len(first) == len(messages(tmp_path)) and any(line.startswith("Bumblebee ") for line in first)


def test_messages_of_the_logger_are_logged_during_the_run(stub_trainer, tmp_path):
    logger = logging.getLogger("bumblebee.datamodule")
    trainer = stub_trainer([FileLog()])
    logger.warning("too early")
    trainer.call("on_fit_start")
    logger.warning("careful with %s", "that")
    trainer.call("on_fit_end")
    logger.warning("too late")
    text = (tmp_path / "log.txt").read_text()
    assert "  warning: careful with that\n" in text and "too" not in text


def test_exception_is_logged_with_its_traceback(crashed_run):
    text = (crashed_run.folder / "log.txt").read_text()
    assert "failed after step 5\nTraceback (most recent call last):\n" in text
    assert text.endswith("RuntimeError: the disk is on fire\n")


def test_resumed_run_appends(resumed_run, crashed_run):
    before, text = ((run.folder / "log.txt").read_text() for run in (crashed_run, resumed_run))
    assert text.startswith(before) and "  resume from step 4: 6 steps on 1 x cpu\n" in text[len(before) :]


def test_metrics_are_logged_every_n_steps_and_at_the_end(stub_trainer, tmp_path):
    stub_trainer([FileLog(every=3)], steps=8).run()
    assert re.findall(r"step (\d) · epoch", (tmp_path / "log.txt").read_text()) == ["1", "4", "7", "8"]


def test_metrics_are_logged_by_time_and_at_the_end(stub_trainer, tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("callbacks.file_log.time.monotonic", lambda: next(clock))
    stub_trainer([FileLog(interval=30)], steps=8).run()
    assert re.findall(r"step (\d) · epoch", (tmp_path / "log.txt").read_text()) == ["1", "4", "7", "8"]


@pytest.mark.parametrize(("interrupt", "event"), [(True, "interrupted"), (False, "stopped early")])
def test_early_end_is_logged_with_its_reason(stub_trainer, stop_after, tmp_path, interrupt, event):
    stub_trainer([FileLog(), stop_after(2, interrupt)]).run()
    assert messages(tmp_path)[-1] == f"{event}: step 2/6, 200 tokens"


@pytest.mark.parametrize(("options", "message"), [
    ({"file": ""}, "file must be a name, got ''"),
    ({"every": 0}, "every must be at least 1 or null, got 0"),
    ({"interval": -1.0}, "interval must be at least 0, got -1.0"),
])  # fmt: skip
def test_invalid_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        FileLog(**options)
