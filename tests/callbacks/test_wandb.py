"""WandB with the real package, offline: what it would send is read back from the file it keeps."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("wandb", reason="needs wandb: pip install 'bumblebee[wandb]'")

from callbacks import Checkpoint, MetricsHistory, Validation, WandB  # noqa: E402
from helpers.stub_engine import StubTrainer  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def away_from_home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        patch.setenv("WANDB_SILENT", "true")
        yield


def records(folder):
    """All records of the runs in output_dir/wandb, the older run first."""
    runs = [complete(file) for file in folder.glob("wandb/offline-run-*/*.wandb")]
    return [record for run in sorted(runs, key=began) for record in run]


def complete(file, seconds=60.0):
    """All records of a run; its last ones may reach the disk a moment after the run was closed."""
    from wandb.proto.wandb_internal_pb2 import Record

    end = time.monotonic() + seconds
    while True:
        found = [Record.FromString(content) for content in chunks(file.read_bytes())]
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        assert time.monotonic() < end, f"{file} has no end"
        time.sleep(0.1)


def began(run):
    return next(record.run.start_time.ToNanoseconds() for record in run if record.WhichOneof("record_type") == "run")


def chunks(data):
    """The format of LevelDB's log: blocks of 32 KiB, and records in pieces with a header of checksum, length and kind."""
    at, parts = 7, b""  # after wandb's own header
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # complete_run, or last
            yield parts
            parts = b""


def of_kind(folder, kind):
    return [getattr(record, kind) for record in records(folder) if record.WhichOneof("record_type") == kind]


def history(folder):
    """One dict for each step that was logged."""
    found = []
    for record in of_kind(folder, "history"):
        found.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.item})
    return found


def points(folder, name):
    return [(line["_step"], line[name]) for line in history(folder) if name in line]


def wandb(**changes):
    return WandB(**{"project": "bees", "offline": True, **changes})


@pytest.fixture
def stub_trainer(stub_trainer, tmp_path):
    """A trainer without a model has nothing to summarise, so there is a recipe."""
    (tmp_path / "recipe.yaml").write_text("seed: 42\ntrainer: {max_steps: 6}\n")
    return stub_trainer


@pytest.fixture(scope="module")
def run(fit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    uses = {"wandb": wandb(name="first", tags=["a", "b"], log_model=True), "history": MetricsHistory()}
    return fit(folder, {**uses, "validation": Validation(every=3)})


def test_each_metric_is_there_by_group_and_step(run, read_lines):
    lines = read_lines(run.folder / "metrics.jsonl")
    for group, name, theirs in (("train", "loss", "loss"), ("train", "lr", "lr"), ("validation", "loss", "validation_loss")):
        ours = [(line["step"], pytest.approx(line[theirs])) for line in lines if theirs in line]
        assert points(run.folder, f"{group}/{name}") == ours
    assert not points(run.folder, "train/step")


def test_the_run_has_its_name_tags_and_configuration(run):
    (there,) = of_kind(run.folder, "run")
    assert (there.project, there.display_name, list(there.tags)) == ("bees", "first", ["a", "b"])
    config = {update.key: json.loads(update.value_json) for update in there.config.update}
    assert config["plan"]["steps"] == 6 and config["model"]["parameters"] == 20_768


def test_the_resolved_recipe_is_the_configuration_where_there_is_one(stub_trainer, tmp_path):
    stub_trainer([wandb()]).run()
    (there,) = of_kind(tmp_path, "run")
    config = {update.key: json.loads(update.value_json) for update in there.config.update}
    assert config["seed"] == 42 and config["trainer"] == {"max_steps": 6}


def test_the_model_folder_is_an_artifact(run):
    (artifact,) = of_kind(run.folder, "artifact")
    files = {Path(entry.path).name for entry in artifact.manifest.contents}
    assert artifact.type == "model" and {"config.json", "model.safetensors"} <= files
    assert not any("checkpoint" in entry.path or "metrics" in entry.path for entry in artifact.manifest.contents)


def test_a_resumed_run_is_the_same_run_there(fit, fail_after, tmp_path):
    def uses():
        return {"wandb": wandb(), "checkpoint": Checkpoint(every=2)}

    fit(tmp_path / "run", {**uses(), "fail": fail_after(5)})
    run = fit(tmp_path / "run", uses(), resume="auto")
    assert run.error is None
    first, second = of_kind(tmp_path / "run", "run")
    assert first.run_id == second.run_id == run.callbacks["wandb"].state_dict()["id"]
    assert [record.exit_code for record in of_kind(tmp_path / "run", "exit")] == [1, 0]  # the first one failed
    assert [step for step, _ in points(tmp_path / "run", "train/loss")] == [1, 2, 3, 4, 5, 5, 6]  # wandb takes the first 5


def test_a_new_run_of_the_same_object_is_a_new_run_there(stub_trainer, tmp_path):
    callback = wandb()
    stub_trainer([callback], steps=1).run()
    stub_trainer([callback], steps=1).run()
    first, second = of_kind(tmp_path, "run")
    assert first.run_id != second.run_id


def test_log_every_thins_out_and_keeps_the_last(stub_trainer, tmp_path):
    stub_trainer([wandb(log_every=4)], steps=10).run()
    assert [step for step, _ in points(tmp_path, "train/loss")] == [4, 8, 10]


@pytest.mark.parametrize(("watch", "groups"), [("gradients", {"gradients"}), ("all", {"gradients", "parameters"})])
def test_histograms_of_what_is_watched(watch, groups, fit, tmp_path):
    run = fit(tmp_path / "run", {"wandb": wandb(watch=watch, watch_every=1)}, max_steps=2)
    assert run.error is None
    found = {name.split("/")[0] for line in history(run.folder) for name in line if "lm_head" in name or "embed" in name}
    assert found == groups


def test_watching_pieces_is_refused(fit, tmp_path):
    run = fit(tmp_path / "run", {"wandb": wandb(watch="gradients")}, zero_stage=3)
    assert isinstance(run.error, ValueError) and "sees only pieces at trainer.zero_stage 3" in str(run.error)


def test_code_is_the_source_below_the_working_folder_without_environments(stub_trainer, tmp_path, monkeypatch):
    for name in ("mine/model.py", "recipe.yaml", ".venv/lib/a.py", "env/site-packages/b.py", "notes.txt", "wandb/c.py"):
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).write_text("seed: 1\n")
    monkeypatch.chdir(tmp_path / "work")
    stub_trainer([wandb(log_code=True)], steps=1).run()
    (artifact,) = of_kind(tmp_path, "artifact")
    assert artifact.type == "code"
    assert {entry.path for entry in artifact.manifest.contents} == {"mine/model.py", "recipe.yaml"}


def test_without_an_account_the_message_says_what_to_do(stub_trainer, monkeypatch):
    import wandb as package

    def refused(**options):
        raise package.errors.UsageError("No API key configured.")

    monkeypatch.setattr(package, "init", refused)
    with pytest.raises(ValueError, match="cannot start: No API key configured.; log in with 'wandb login', or set offline"):
        stub_trainer([WandB("bees")]).run()


def test_without_the_package_the_message_says_what_to_install(monkeypatch, stub_trainer):
    monkeypatch.setattr("callbacks.wandb.find_spec", lambda name: None)
    trainer = stub_trainer([WandB("bees")])
    monkeypatch.setattr(StubTrainer, "is_main", False)  # on every rank, so that none waits for another
    with pytest.raises(ValueError, match=r"needs the wandb package: pip install 'bumblebee\[wandb\]'"):
        trainer.run()


def test_the_class_is_there_without_the_package():
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
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        wandb(**options)
