from __future__ import annotations

import re

import pytest

from callbacks import FileLog


def messages(folder):
    return [line[27:] for line in (folder / "log.txt").read_text().splitlines()]


def test_each_line_begins_with_its_time(whole):
    for line in (whole.folder / "log.txt").read_text().splitlines():
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d  \S", line)


def test_a_run_is_told_from_begin_to_end(whole):
    lines = messages(whole.folder)
    assert lines[0] == "start: 6 steps on 1 x cpu"
    assert lines[1].startswith("validation at step 0: loss ")
    assert lines[2].startswith("step 1 · epoch 0.3636 · loss ")
    assert f"checkpoint: {whole.folder / 'checkpoint-4'}" in lines
    assert lines[-1].startswith("finished: step 6/6, ")


def test_an_exception_is_there_with_its_traceback(killed):
    text = (killed.folder / "log.txt").read_text()
    assert "failed after step 5\nTraceback (most recent call last):\n" in text
    assert text.endswith("RuntimeError: the disk is on fire\n")


def test_a_resumed_run_appends(continued, killed):
    before, text = ((run.folder / "log.txt").read_text() for run in (killed, continued))
    assert text.startswith(before) and "  resume from step 4: 6 steps on 1 x cpu\n" in text[len(before) :]


def test_metrics_are_logged_every_n_steps_and_at_the_last(fake, tmp_path):
    fake([FileLog(every=3)], steps=8).run()
    assert re.findall(r"step (\d) · loss", (tmp_path / "log.txt").read_text()) == ["1", "4", "7", "8"]


def test_metrics_are_logged_by_the_clock_and_at_the_last_step(fake, tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("callbacks.file_log.time.monotonic", lambda: next(clock))
    fake([FileLog(interval=30)], steps=8).run()
    assert re.findall(r"step (\d) · loss", (tmp_path / "log.txt").read_text()) == ["1", "4", "7", "8"]


@pytest.mark.parametrize(("interrupted", "word"), [(True, "interrupted"), (False, "stopped early")])
def test_an_early_end_is_called_by_its_name(fake, tmp_path, interrupted, word):
    trainer = fake([FileLog()])
    trainer.stop_at, trainer.interrupted = 2, interrupted
    trainer.run()
    assert messages(tmp_path)[-1] == f"{word}: step 2/6, 200 tokens"


@pytest.mark.parametrize(("options", "message"), [
    ({"file": ""}, "file must be a name, got ''"),
    ({"every": 0}, "every must be at least 1 or null, got 0"),
    ({"interval": -1.0}, "interval must be at least 0, got -1.0"),
])  # fmt: skip
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FileLog(**options)
