"""Damaged checkpoints and weights are refused, by the digests that were saved with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.damage import flip_bit
from helpers.training_runs import small_model, train, weight_bytes

from bumblebee.checkpoint import atomic, digests
from bumblebee.checkpoint.atomic import written_aside
from bumblebee.checkpoint.consolidate import consolidate
from bumblebee.checkpoint.digests import NAME, describe_damage, file_digest, read_digests, remembered_digest, write_digests
from bumblebee.checkpoint.merge import merge
from bumblebee.checkpoint.trainer_state import checkpoints
from bumblebee.cli.main import main
from bumblebee.training.checkpointing import verify_checkpoint
from bumblebee.training.run_folder import find_resume

STATE = "training_state/optimizer-00000-of-00001.safetensors"
RANDOM = "training_state/random-00000"
SAVE = {"checkpoint": ("Checkpoint", {"every": 2, "keep": None})}


def check_with_sha256sum(folder: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "--quiet", NAME]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def files_of(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with three checkpoints."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(folder, callbacks=SAVE, zero_stage=1)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resume(checkpoint: Path, folder: Path) -> None:
    train(folder, resume=str(checkpoint), zero_stage=1)


# -- what is written -----------------------------------------------------------------------------------------------------


def test_every_file_of_a_checkpoint_has_its_digest(finished: Path) -> None:
    for checkpoint in checkpoints(finished):
        assert {*(read_digests(checkpoint.path) or {}), NAME} == files_of(checkpoint.path)
        check_with_sha256sum(checkpoint.path)


def test_final_model_of_a_run_has_digests(finished: Path) -> None:
    assert set(read_digests(finished) or {}) == {"config.json", "generation_config.json", "model.safetensors"}
    check_with_sha256sum(finished)


def test_consolidating_in_place_keeps_the_digests_complete(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoint-4"
    consolidate(checkpoint, checkpoint, dtype="bfloat16", max_shard_size="20KB")
    check_with_sha256sum(checkpoint)
    assert {*(read_digests(checkpoint) or {}), NAME} == files_of(checkpoint)


def test_saving_over_a_checkpoint_leaves_no_wrong_digest(run: Path) -> None:
    checkpoint = run / "checkpoint-4"
    small_model(seed=1).save_pretrained(checkpoint, max_shard_size="20KB")  # removes model.safetensors
    check_with_sha256sum(checkpoint)
    assert STATE in (read_digests(checkpoint) or {}) and "model.safetensors" not in (read_digests(checkpoint) or {})


@pytest.mark.parametrize("call", range(1, 5))
def test_crash_while_replacing_files_leaves_no_wrong_digest(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    for name in "abc":
        (tmp_path / "m" / name).write_text("old")
    write_digests(tmp_path / "m", {})
    calls, replace = [], os.replace

    def failing(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == call:
            raise OSError("Input/output error")
        replace(source, target)

    with pytest.raises(OSError, match="Input/output error"), written_aside(tmp_path / "m") as aside:
        for name in "ab":
            (aside / name).write_text("new")
        write_digests(aside, {})
        monkeypatch.setattr(atomic.os, "replace", failing)
    monkeypatch.undo()
    listed = read_digests(tmp_path / "m") or {}
    assert "c" in listed
    assert {name: file_digest(tmp_path / "m" / name) for name in listed} == listed


# -- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "position"),
    [
        (STATE, -1),
        (STATE, 20),  # in the header
        (f"{RANDOM}.safetensors", -1),
        (f"{RANDOM}.json", 100),
        ("trainer_state.json", -10),
        ("trainer_state.json", 0),  # no longer JSON
    ],
)
def test_flipped_bit_names_file_and_previous_checkpoint(name: str, position: int, run: Path, tmp_path: Path) -> None:
    flip_bit(run / "checkpoint-4" / name, position)
    with pytest.raises(ValueError) as error:
        resume(run / "checkpoint-4", tmp_path / "resumed")
    damage = f"{run}/checkpoint-4/{name} is damaged: its SHA-256 differs from the one in SHA256SUMS"
    assert str(error.value) == (
        f"trainer.resume: {damage}; use the previous good checkpoint: --trainer.resume {run}/checkpoint-2"
    )
    assert not (tmp_path / "resumed").exists()
    resume(run / "checkpoint-2", run)  # what the message advises
    assert len(checkpoints(run)) == 3


def test_earlier_checkpoint_must_be_intact_to_be_named(run: Path) -> None:
    flip_bit(run / "checkpoint-6" / STATE)
    flip_bit(run / "checkpoint-4" / STATE)
    with pytest.raises(ValueError, match="--trainer.resume .*checkpoint-2$"):
        train(run, resume="auto", zero_stage=1)
    flip_bit(run / "checkpoint-2" / STATE)
    with pytest.raises(ValueError, match="checkpoint-6/.* is damaged: .*; no earlier checkpoint is intact"):
        train(run, resume="auto", zero_stage=1)


def test_missing_unlisted_and_malformed_are_named(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoint-4"
    shutil.copy(checkpoint / STATE, checkpoint / "training_state" / "optimizer-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="optimizer-00001-of-00002.safetensors is not listed in SHA256SUMS"):
        resume(checkpoint, tmp_path / "resumed")
    (checkpoint / "training_state" / "optimizer-00001-of-00002.safetensors").unlink()
    (checkpoint / f"{RANDOM}.json").unlink()
    with pytest.raises(ValueError, match=r"random-00000.json is missing"):
        resume(checkpoint, tmp_path / "resumed")
    flip_bit(checkpoint / NAME, 64)  # the space between digest and name
    with pytest.raises(ValueError, match=r"SHA256SUMS:1 is damaged: expected a SHA-256 and a file name"):
        resume(checkpoint, tmp_path / "resumed")


@pytest.mark.parametrize("consolidated", [False, True])
def test_checkpoint_without_digests_resumes(consolidated: bool, run: Path, tmp_path: Path) -> None:
    (run / "checkpoint-4" / NAME).unlink()
    state = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())
    (run / "checkpoint-4" / "trainer_state.json").write_text(
        json.dumps({name: value for name, value in state.items() if name != "fingerprint"})
    )
    if consolidated:  # adds those of the model's files
        consolidate(run / "checkpoint-4", run / "checkpoint-4")
        assert "model.safetensors" in (read_digests(run / "checkpoint-4") or {})
    resume(run / "checkpoint-4", tmp_path / "resumed")
    assert weight_bytes(tmp_path / "resumed") == weight_bytes(run)


def test_damaged_weights_do_not_stop_a_resume_that_reads_none(run: Path, tmp_path: Path) -> None:
    flip_bit(run / "checkpoint-4" / "model.safetensors")
    resume(run / "checkpoint-4", tmp_path / "resumed")
    assert weight_bytes(tmp_path / "resumed") == weight_bytes(run)


def test_consolidate_refuses_in_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_bit(run / "checkpoint-4" / STATE)
    with pytest.raises(SystemExit) as done:
        main(["consolidate", str(run / "checkpoint-4"), "--output", str(tmp_path / "out")])
    assert done.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"checkpoint-4/{STATE} is damaged" in line and line.endswith(f"previous good checkpoint: {run}/checkpoint-2")
    assert not (tmp_path / "out").exists()


def test_consolidating_a_run_names_its_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"newest checkpoint is {checkpoints(run)[-1].path}"):
        consolidate(run, tmp_path / "out")


def test_digest_of_a_large_file_is_remembered_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "LARGE_FILE", 4)
    read: list[Path] = []
    monkeypatch.setattr(digests, "file_digest", lambda path: (read.append(path), file_digest(path))[1])
    file, memory = tmp_path / "large", tmp_path / "memory"
    file.write_text("first content")
    first = [remembered_digest(file, memory) for _ in range(3)]
    assert len(read) == 1 and set(first) == {file_digest(file)}
    file.write_text("other content")
    assert remembered_digest(file, memory) == file_digest(file) != first[0]
    for damage in ("damaged", '{"file": 1}', "[]", next(memory.iterdir()).read_text().replace('"digest": "', '"digest": "?')):
        next(memory.iterdir()).write_text(damage)
        assert remembered_digest(file, memory) == file_digest(file)
    assert remembered_digest(file, file / "unwritable") == file_digest(file)


# -- merging -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter_run(finished: Path, tmp_path: Path) -> Path:
    """A LoRA run on a copy of the finished run's last checkpoint."""
    base = shutil.copytree(finished / "checkpoint-6", tmp_path / "base")
    train(tmp_path / "lora", base=str(base), lora={"rank": 2, "alpha": 4}, callbacks=SAVE, max_steps=4)
    return tmp_path / "lora"


def test_merge_refuses_damaged_adapters_and_bases(adapter_run: Path, tmp_path: Path) -> None:
    merge(adapter_run, tmp_path / "out")
    check_with_sha256sum(tmp_path / "out")
    for damaged in (adapter_run / "adapter_model.safetensors", tmp_path / "base" / "model.safetensors"):
        flip_bit(damaged)
        with pytest.raises(ValueError, match=f"{damaged} is damaged: its SHA-256 differs"):
            merge(adapter_run, tmp_path / "out", overwrite=True)
        flip_bit(damaged)
    flip_bit(adapter_run / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="use the previous good checkpoint: .*/lora/checkpoint-4"):
        merge(adapter_run, tmp_path / "out", overwrite=True)


def damages(content: bytes, json_file: bool) -> dict[str, bytes | None]:
    """Damaged contents by kind; None for a file that is removed."""
    cut = {"truncated": content[: len(content) // 2], "empty": b"", "garbage": bytes(7 * n % 256 for n in range(len(content)))}
    other = {"list": b"[]", "null": b"null", "object": b"{}"} if json_file else {}
    return {**cut, **other, "removed": None}


@pytest.mark.parametrize("digests", [True, False], ids=["digests", "no digests"])
def test_any_damage_to_a_state_file_is_named(digests: bool, run: Path) -> None:
    checkpoint = run / "checkpoint-4"
    if not digests:
        (checkpoint / NAME).unlink()
    files = [checkpoint / "trainer_state.json", *sorted((checkpoint / "training_state").iterdir())]
    assert len(files) == 4
    for file in files:
        content = file.read_bytes()
        for kind, damaged in damages(content, file.suffix == ".json").items():
            file.unlink() if damaged is None else file.write_bytes(damaged)
            with pytest.raises(ValueError) as error:
                verify_checkpoint(checkpoint)
            named = file.name if digests or kind != "removed" else file.name.partition("-")[0]
            assert named in str(error.value) and "\n" not in str(error.value), kind
            assert str(error.value).endswith(f"; use the previous good checkpoint: --trainer.resume {run}/checkpoint-2"), kind
        file.write_bytes(content)
    verify_checkpoint(checkpoint)


@pytest.mark.parametrize("kept", [0, 2])
def test_truncated_list_of_digests_is_damage(kept: int, run: Path) -> None:
    lines = (run / "checkpoint-4" / NAME).read_text().splitlines(keepends=True)
    (run / "checkpoint-4" / NAME).write_text("".join(lines[:kept]))
    with pytest.raises(ValueError, match=f"{NAME} is damaged: it does not list the training state; use the previous good"):
        verify_checkpoint(run / "checkpoint-4")


def test_damaged_header_is_named_without_digests(run: Path) -> None:
    (run / "checkpoint-4" / NAME).unlink()
    file = run / "checkpoint-4" / STATE
    header = file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")]
    for text in (b"pieces", b"numel", b"start", b"shape", b"embed_tokens"):
        position = 8 + header.index(text)
        flip_bit(file, position)
        with pytest.raises(ValueError, match=f"{file} is damaged: .*; use the previous good checkpoint: .*/checkpoint-2"):
            verify_checkpoint(run / "checkpoint-4")
        flip_bit(file, position)


def test_missing_random_state_of_a_rank_is_an_error(run: Path) -> None:
    checkpoint = run / "checkpoint-4"
    (checkpoint / NAME).unlink()
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps({**state, "ranks": 2}))
    with pytest.raises(ValueError, match="random-00001.safetensors is missing; use the previous good checkpoint"):
        verify_checkpoint(checkpoint)


def test_one_damaged_checkpoint_does_not_block_auto(run: Path) -> None:
    for content in ("[]", "5", "null", "{", '{"last": 1}'):
        (run / "checkpoint-2" / "trainer_state.json").write_text(content)
        assert find_resume("auto", run) == run / "checkpoint-6"
    (run / "checkpoint-2" / "trainer_state.json").unlink()
    assert find_resume("auto", run) == run / "checkpoint-6"
    train(run, max_steps=7, resume="auto", zero_stage=1, callbacks=SAVE)
    (run / "checkpoint-7" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="checkpoint-7/trainer_state.json is missing; use the previous .*/checkpoint-6$"):
        train(run, max_steps=8, resume="auto", zero_stage=1)


def test_edited_config_is_not_damage(run: Path) -> None:
    (run / "checkpoint-4" / "generation_config.json").write_text("{}")
    consolidate(run / "checkpoint-4", run / "checkpoint-4")
    assert describe_damage(run / "checkpoint-4", ["model.safetensors"]) is None
