from __future__ import annotations

import json
import math

import pytest
from helpers.training_runs import train

from bumblebee.training.metrics.jsonl_log import json_line, truncate_after
from callbacks import MetricsHistory


def test_one_line_per_logged_step_and_validation(complete_run, read_lines):
    lines = read_lines(complete_run.folder / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    validations = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in validations] == [0, 3, 6]
    assert set(training[0]) == {"step", "epoch", "loss", "perplexity", "grad_norm", "lr", "tokens", "seconds"}
    assert validations[1]["epoch"] == 1.0 and validations[1]["validation_perplexity"] > 1


def test_seconds_continue_after_a_resume(resumed_run, crashed_run, read_lines):
    lines = read_lines(resumed_run.folder / "metrics.jsonl")
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    at_step = {line["step"]: line["seconds"] for line in lines}
    before = {line["step"]: line["seconds"] for line in lines_of_crashed_run(crashed_run)}
    assert at_step[4] == before[4] < at_step[5]


def lines_of_crashed_run(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def test_resumed_run_has_the_metrics_of_an_uninterrupted_one(resumed_run, complete_run, read_lines):
    def numbers(run):
        lines = read_lines(run.folder / "metrics.jsonl")
        return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]

    assert numbers(resumed_run) == numbers(complete_run)


def test_truncation_removes_later_and_incomplete_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "validation_loss": 1.0}\n{"step": 3}\n{"step": 4, "lo')
    truncate_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "validation_loss": 1.0}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_truncated_last_line_is_written_again_exactly(tmp_path):
    """The line of the step that the run resumes from."""
    job = {"log_every": 2, "callbacks": {"history": ("MetricsHistory", {}), "checkpoint": ("Checkpoint", {"every": 3})}}
    train(tmp_path, max_steps=3, **job)
    file = tmp_path / "metrics.jsonl"
    before = file.read_bytes()
    file.write_bytes(before[:-30])
    train(tmp_path, max_steps=5, resume="auto", **job)
    assert file.read_bytes().startswith(before)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [2, 3, 4, 5]


def test_last_lines_that_the_file_lacks_are_added_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    last = ['{"step": 2}\n', '{"step": 2, "validation_loss": 1.0}\n']
    for text in ("", '{"step": 2}', "".join(last)):
        path.write_text('{"step": 1}\n' + text)
        truncate_after(path, 2, last)
        assert path.read_text() == '{"step": 1}\n' + "".join(last)


def test_incomplete_line_with_invalid_utf8_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "\xc3')
    truncate_after(path, 5)
    assert path.read_text() == '{"step": 1}\n'


def test_complete_line_without_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    truncate_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_new_run_starts_an_empty_file(stub_trainer, tmp_path, read_lines):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "validation_loss": 9}\n{"step": 1, "loss": 9}\n')
    stub_trainer([MetricsHistory()], steps=2).run()
    assert [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")] == [2.0, 1.0]


def test_truncation_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bumblebee.training.metrics.jsonl_log.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        truncate_after(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_line_is_written_when_the_hook_returns(stub_trainer, tmp_path):
    trainer = stub_trainer([MetricsHistory("logs/numbers.jsonl")])
    trainer.call("on_fit_start")
    trainer.call("on_log", {"step": 1, "loss": 2.0})
    assert json.loads((tmp_path / "logs/numbers.jsonl").read_text())["loss"] == 2.0


def test_metrics_are_on_disk_before_a_checkpoint_is(stub_trainer, tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr("callbacks.metrics_history.flush", flushed.append)
    history = MetricsHistory()
    trainer = stub_trainer([history])
    trainer.call("on_fit_start")
    trainer.call("on_log", {"step": 1, "loss": 2.0})
    assert history.state_dict()["last"] == (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert flushed == [tmp_path / "metrics.jsonl"]


def test_nan_and_infinity_become_null():
    line = json_line({"step": 3, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    assert line == '{"step": 3, "loss": null, "grad_norm": null, "lr": 0.1}\n'


def test_seconds_continue_from_the_state(stub_trainer, tmp_path, read_lines):
    history = MetricsHistory()
    history.load_state_dict({"seconds": 1000.0})
    stub_trainer([history], step=5).run()
    assert 1000.0 <= read_lines(tmp_path / "metrics.jsonl")[-1]["seconds"] < 1010.0


def test_empty_file_name_raises():
    with pytest.raises(ValueError, match="file must be a name, got ''"):
        MetricsHistory("")
