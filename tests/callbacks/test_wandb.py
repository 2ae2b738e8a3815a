"""WandB with the real package, offline: the records that it would send are read back from its file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("wandb", reason="needs wandb: pip install 'bumblebee[wandb]'")

from helpers.stub_engine import StubTrainer  # noqa: E402

from callbacks import Checkpoint, MetricsHistory, Validation, WandB  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def temporary_wandb_folders(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        patch.setenv("WANDB_SILENT", "true")
        yield


def records(folder):
    """All records of the runs in output_dir/wandb, the oldest run first."""
    runs = [complete_records(file) for file in folder.glob("wandb/offline-run-*/*.wandb")]
    return [record for run in sorted(runs, key=start_time) for record in run]


def complete_records(file, seconds=60.0):
    """All records of a run. The last ones may reach the disk a moment after the run was finished."""
    from wandb.proto.wandb_internal_pb2 import Record

    end = time.monotonic() + seconds
    while True:
        records = [Record.FromString(content) for content in leveldb_records(file.read_bytes())]
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        assert time.monotonic() < end, f"{file} has no exit record"
        time.sleep(0.1)


def start_time(run):
    return next(record.run.start_time.ToNanoseconds() for record in run if record.WhichOneof("record_type") == "run")


def leveldb_records(data):
    """The LevelDB log format: blocks of 32 KiB, records in fragments with a header of checksum, length and type."""
    offset, record = 7, b""  # after wandb's own header
    while offset + 7 <= len(data):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        length, fragment_type = int.from_bytes(data[offset + 4 : offset + 6], "little"), data[offset + 6]
        record += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if fragment_type in (1, 4):  # full or last
            yield record
            record = b""


def of_type(folder, record_type):
    return [getattr(record, record_type) for record in records(folder) if record.WhichOneof("record_type") == record_type]


def history(folder):
    """One dict per logged step."""
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.item}
        for record in of_type(folder, "history")
    ]


def points(folder, name):
    return [(line["_step"], line[name]) for line in history(folder) if name in line]


def wandb(**changes):
    return WandB(**{"project": "bees", "offline": True, **changes})


@pytest.fixture
def stub_trainer(stub_trainer, tmp_path):
    """With a resolved recipe in the output folder."""
    (tmp_path / "recipe.yaml").write_text("seed: 42\ntrainer: {max_steps: 6}\n")
    return stub_trainer


@pytest.fixture(scope="module")
def run(fit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    uses = {"wandb": wandb(name="first", tags=["a", "b"], log_model=True), "history": MetricsHistory()}
    return fit(folder, {**uses, "validation": Validation(every=3)})


def test_metrics_are_logged_by_group_and_step(run, read_lines):
    lines = read_lines(run.folder / "metrics.jsonl")
    for group, name, logged in (("train", "loss", "loss"), ("train", "lr", "lr"), ("validation", "loss", "validation_loss")):
        expected = [(line["step"], pytest.approx(line[logged])) for line in lines if logged in line]
        assert points(run.folder, f"{group}/{name}") == expected
    assert not points(run.folder, "train/step")


def test_run_has_name_tags_and_config(run):
    (wandb_run,) = of_type(run.folder, "run")
    assert (wandb_run.project, wandb_run.display_name, list(wandb_run.tags)) == ("bees", "first", ["a", "b"])
    config = {update.key: json.loads(update.value_json) for update in wandb_run.config.update}
    assert config["plan"]["steps"] == 6 and config["model"]["parameters"] == 20_768


def test_resolved_recipe_is_the_config(stub_trainer, tmp_path):
    stub_trainer([wandb()]).run()
    (wandb_run,) = of_type(tmp_path, "run")
    config = {update.key: json.loads(update.value_json) for update in wandb_run.config.update}
    assert config["seed"] == 42 and config["trainer"] == {"max_steps": 6}


def test_model_folder_is_an_artifact(run):
    (artifact,) = of_type(run.folder, "artifact")
    files = {Path(entry.path).name for entry in artifact.manifest.contents}
    assert artifact.type == "model" and {"config.json", "model.safetensors"} <= files
    assert not any("checkpoint" in entry.path or "metrics" in entry.path for entry in artifact.manifest.contents)


def test_resumed_run_continues_the_wandb_run(fit, fail_after, tmp_path):
    def uses():
        return {"wandb": wandb(), "checkpoint": Checkpoint(every=2)}

    fit(tmp_path / "run", {**uses(), "fail": fail_after(5)})
    run = fit(tmp_path / "run", uses(), resume="auto")
    assert run.error is None
    first, second = of_type(tmp_path / "run", "run")
    assert first.run_id == second.run_id == run.callbacks["wandb"].state_dict()["id"]
    assert [record.exit_code for record in of_type(tmp_path / "run", "exit")] == [1, 0]  # the first run failed
    assert [step for step, _ in points(tmp_path / "run", "train/loss")] == [1, 2, 3, 4, 5, 5, 6]  # W&B ignores the second 5


def test_second_run_of_the_same_object_is_a_new_wandb_run(stub_trainer, tmp_path):
    callback = wandb()
    stub_trainer([callback], steps=1).run()
    stub_trainer([callback], steps=1).run()
    first, second = of_type(tmp_path, "run")
    assert first.run_id != second.run_id


def test_log_every_keeps_the_last_step(stub_trainer, tmp_path):
    stub_trainer([wandb(log_every=4)], steps=10).run()
    assert [step for step, _ in points(tmp_path, "train/loss")] == [4, 8, 10]


@pytest.mark.parametrize(("watch", "groups"), [("gradients", {"gradients"}), ("all", {"gradients", "parameters"})])
def test_watch_logs_histograms(watch, groups, fit, tmp_path):
    run = fit(tmp_path / "run", {"wandb": wandb(watch=watch, watch_every=1)}, max_steps=2)
    assert run.error is None
    logged = {name.split("/")[0] for line in history(run.folder) for name in line if "lm_head" in name or "embed" in name}
    assert logged == groups


def test_watch_at_zero_3_raises(fit, tmp_path):
    run = fit(tmp_path / "run", {"wandb": wandb(watch="gradients")}, zero_stage=3)
    assert isinstance(run.error, ValueError) and "sees only shards at trainer.zero_stage 3" in str(run.error)


def test_code_artifact_has_sources_without_environments(stub_trainer, tmp_path, monkeypatch):
    for name in ("mine/model.py", "recipe.yaml", ".venv/lib/a.py", "env/site-packages/b.py", "notes.txt", "wandb/c.py"):
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).write_text("seed: 1\n")
    monkeypatch.chdir(tmp_path / "work")
    stub_trainer([wandb(log_code=True)], steps=1).run()
    (artifact,) = of_type(tmp_path, "artifact")
    assert artifact.type == "code"
    assert {entry.path for entry in artifact.manifest.contents} == {"mine/model.py", "recipe.yaml"}


def test_missing_account_is_found_before_anything_is_written(stub_trainer, monkeypatch, tmp_path):
    import wandb as package

    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    package.teardown()  # settings are read once
    with pytest.raises(ValueError, match="cannot start: No API key configured.*; log in with 'wandb login', or set offline"):
        stub_trainer([WandB("bees")])  # when it is set up
    assert not (tmp_path / "wandb").exists()


def test_wandb_mode_offline_needs_no_account(stub_trainer, monkeypatch, tmp_path):
    import wandb as package

    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    package.teardown()
    stub_trainer([WandB("bees")], steps=1).run()
    assert points(tmp_path, "train/loss") == [(1, 2.0)]


def test_error_without_the_package_explains_installation(monkeypatch, stub_trainer):
    monkeypatch.setattr("callbacks.wandb.find_spec", lambda name: None)
    monkeypatch.setattr(StubTrainer, "is_main", False)  # on every rank, so that none waits for another
    with pytest.raises(ValueError, match="needs the wandb package: pip install wandb"):
        stub_trainer([WandB("bees")])


def test_class_exists_without_the_package():
    code = "import sys; sys.modules['wandb'] = None; import callbacks; callbacks.WandB('bees')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"project": ""}, "project must be a name, got ''"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"watch_every": 0}, "watch_every must be at least 1, got 0"),
        ({"watch": "losses"}, "watch must be gradients, parameters, all or null, got 'losses'"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        wandb(**options)
