"""A full disk is one error that names the file, for every small file. /dev/full is a disk without space."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from helpers.training_runs import Fail, train

from bumblebee.checkpoint.digests import write_digests
from bumblebee.cli.errors.reporting import message_of
from bumblebee.tokenizer.tokenizer import Tokenizer
from bumblebee.training.metrics.jsonl_log import truncate_after
from bumblebee.training.random_state import save_random_state
from bumblebee.utils.json_files import write_json


def full(path: Path) -> Path:
    path.symlink_to("/dev/full")
    return path


def write_tokenizer(folder: Path) -> None:
    Tokenizer.train(["a text"], 300).save_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("tokenizer.json", write_tokenizer),
        (".tokenizer_config.json.partial", write_tokenizer),
        (".best.json.partial", lambda folder: write_json(folder / "best.json", {})),
        (".SHA256SUMS.partial", lambda folder: write_digests(folder, {"a": "0"})),
        ("random-00000.json", lambda folder: save_random_state(folder, 0)),
        (".lines.jsonl.partial", lambda folder: truncate_after(folder / "lines.jsonl", 1)),
    ],
)
def test_a_full_disk_names_the_file(name, write, tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "a").write_text("of a model")
    file = full(tmp_path / name)
    with pytest.raises(OSError) as caught:
        write(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert message_of(caught.value) == f"{file}: No space left on device"


def test_a_run_that_cannot_write_its_log_names_it(tmp_path):
    file = full(tmp_path / "log")
    with pytest.raises(OSError) as caught:
        train(tmp_path, callbacks={"log": ("FileLog", {"file": "log"})})
    assert message_of(caught.value) == f"{file}: No space left on device"


def test_the_log_of_a_full_disk_does_not_hide_the_error(tmp_path, monkeypatch):
    def fill(self, trainer):
        (tmp_path / "log").unlink()
        full(tmp_path / "log")
        raise RuntimeError("the reason")

    monkeypatch.setattr(Fail, "on_step_end", fill)
    with pytest.raises(RuntimeError, match="the reason"):
        train(tmp_path, callbacks={"log": ("FileLog", {"file": "log"}), "fail": ("Fail", {"step": 1})})
