"""verify.json speaks for a run with the same versions, hardware and settings, and for no other."""

from __future__ import annotations

import json

import pytest

from bumblebee.training import verification_record
from bumblebee.training.run_summary import _line, _verify_line, summarize
from bumblebee.training.verification_record import FILE, current_setup


@pytest.fixture
def run(stub_trainer, tmp_path):
    """A run in runs/a, which has no verify.json yet."""
    trainer = stub_trainer([])
    trainer.output_dir = tmp_path / "runs" / "a"
    trainer.output_dir.mkdir(parents=True)
    return trainer


def record(run, status="pass", **settings):
    setup = current_setup(run.device, run.precision, run.zero_stage, "sdpa")
    setup["settings"] |= settings
    check = {"name": "resume", "status": status, "seconds": 1.0, "measurements": [], "error": None, "note": ""}
    return {**setup, "date": "2026-11-28T10:00:00+00:00", "passed": status == "pass", "checks": [check]}


def run_setup(run):
    return current_setup(run.device, run.precision, run.zero_stage, "sdpa", run.task.model.config, run.fingerprint["data"])


def line(run) -> str:
    return _line("verify", _verify_line(json.loads(json.dumps(summarize(run)["verify"]))), None)


def test_result_for_the_same_setup_is_copied_and_shown(run):
    verification_record.write(run.output_dir.parent, record(run))
    verification_record.copy_current(run)
    assert json.loads((run.output_dir / FILE).read_text()) == record(run)
    assert line(run) == "  verify     passed 1 check on 2026-11-28"


def test_missing_result_is_one_short_line(run):
    verification_record.copy_current(run)
    assert not (run.output_dir / FILE).exists() and line(run) == "  verify     not run"


@pytest.mark.parametrize(("section", "name"), [("versions", "torch"), ("hardware", "ranks"), ("settings", "precision")])
def test_result_for_another_setup_names_the_difference(section, name, run):
    other = record(run)
    now, other[section][name] = other[section][name], "other"
    verification_record.write(run.output_dir.parent, other)
    (run.output_dir / FILE).write_text("{}")  # of an earlier part of the run
    verification_record.copy_current(run)
    assert not (run.output_dir / FILE).exists()
    assert line(run) == f"  verify     not for this setup: {name} other then, {now} now"


def test_result_of_a_recipe_speaks_for_runs_of_its_model_and_data_only(run):
    own = record(run) | {"recipe": run_setup(run)["recipe"]}
    verification_record.write(run.output_dir.parent, own)
    assert line(run) == "  verify     passed 1 check on 2026-11-28"
    run.task.model.config.rope_theta *= 2
    assert line(run) == "  verify     not for this setup: another model then"
    verification_record.write(run.output_dir.parent, record(run))  # of all model families
    assert line(run) == "  verify     passed 1 check on 2026-11-28"


def test_failed_checks_are_named(run):
    verification_record.write(run.output_dir.parent, record(run, status="FAIL"))
    assert line(run) == "  verify     FAILED on 2026-11-28: resume"


def test_results_for_other_settings_are_kept(run):
    for stage in (run.zero_stage, 3, 3):
        verification_record.write(run.output_dir.parent, record(run, zero_stage=stage))
    content = json.loads((run.output_dir.parent / FILE).read_text())
    assert content["settings"]["zero_stage"] == 3
    assert [one["settings"]["zero_stage"] for one in content["earlier"]] == [run.zero_stage]
    assert line(run) == "  verify     passed 1 check on 2026-11-28"


def test_damaged_file_counts_as_missing(run):
    (run.output_dir.parent / FILE).write_text("[")
    assert line(run) == "  verify     not run"
