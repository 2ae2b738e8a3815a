from __future__ import annotations

import gzip
import json

import pytest

from callbacks import Checkpoint, Profiler


def step_marks(trace):
    return sorted({event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep#")})


def test_trace_and_table_are_written(fit, tmp_path):
    run = fit(tmp_path / "run", {"profiler": Profiler(start=2, steps=2)})
    assert run.error is None
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    assert step_marks(trace) == ["ProfilerStep#3", "ProfilerStep#4"]
    table = (tmp_path / "run" / "profile.txt").read_text()
    assert "Self CPU" in table and "aten::" in table
    rows = [line for line in table.splitlines() if "%" in line and "Self CPU %" not in line]
    assert len(rows) == 10
    assert f"{table}profiler: 2 steps written to {tmp_path / 'run' / 'trace.json'} and profile.txt" in run.text


def test_start_counts_from_the_resumed_step(fit, fail_after, tmp_path):
    fit(tmp_path / "run", {"checkpoint": Checkpoint(every=3), "fail": fail_after(3)})
    run = fit(tmp_path / "run", {"profiler": Profiler(start=1, steps=1, file="p/trace.json.gz")}, resume="auto")
    assert "profiler: 1 steps written" in run.text
    with gzip.open(tmp_path / "run" / "p" / "trace.json.gz") as stream:
        assert step_marks(json.load(stream)) == ["ProfilerStep#5"]


def test_run_that_ends_early_writes_a_profile(fit, tmp_path):
    run = fit(tmp_path / "run", {"profiler": Profiler(start=1, steps=9)}, max_steps=3)
    assert "profiler: 2 steps written" in run.text and (tmp_path / "run" / "trace.json").is_file()


def test_run_that_ends_before_start_reports_it(fit, tmp_path):
    run = fit(tmp_path / "run", {"profiler": Profiler(start=5)}, max_steps=2)
    assert "profiler: nothing recorded, the run ended before step 6" in run.text
    assert not (tmp_path / "run" / "trace.json").exists()


def test_profiler_can_restart_after_an_exception(fit, fail_after, tmp_path):
    run = fit(tmp_path / "a", {"profiler": Profiler(start=0, steps=9), "fail": fail_after(2)})
    assert isinstance(run.error, RuntimeError) and not (tmp_path / "a" / "trace.json").exists()
    run = fit(tmp_path / "b", {"profiler": Profiler(start=0, steps=1)}, max_steps=1)
    assert run.error is None and (tmp_path / "b" / "trace.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -1}, "start must be at least 0, got -1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"file": ""}, "file must be a name, got ''"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        Profiler(**options)
