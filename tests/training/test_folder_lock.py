"""The lock on a run's folder: one run at a time, released however the process ends."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest
from helpers.processes import ROOT
from helpers.training_runs import train

from bumblebee.callback import Callback
from bumblebee.training import folder_lock
from bumblebee.training.folder_lock import FolderInUse, FolderLock

HOLD = """
import sys
from pathlib import Path
from bumblebee.training.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
import os
if os.fork() == 0:  # a worker that outlives its run
    import time
    time.sleep(20)
    os._exit(0)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(words, env=environment, text=True, start_new_session=True, **pipes)
    assert process.stdout.readline() == "locked\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.stdin.close()
    process.wait()


@pytest.mark.slow
def test_a_run_is_refused_while_another_process_writes_there(holder, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    for job in ({}, {"overwrite": True}, {"resume": "auto"}):
        with pytest.raises(ValueError, match=rf"^output_dir: {tmp_path} is in use by another run \(process {holder.pid} on "):
            train(tmp_path, **job)
    assert {file.name for file in tmp_path.iterdir()} == {".lock", "mine.txt"}
    holder.kill()
    holder.wait()
    train(tmp_path, max_steps=1)  # although a child of the killed process lives on
    assert not (tmp_path / ".lock").exists()


class StartAnother(Callback):
    def on_step_end(self, trainer) -> None:
        with pytest.raises(FolderInUse, match=rf"process {os.getpid()}, this one"):
            FolderLock(trainer.output_dir)


def test_the_lock_is_held_during_the_run_and_then_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.training_runs.StartAnother", StartAnother, raising=False)
    train(tmp_path / "run", max_steps=1, callbacks={"another": ("StartAnother", {})})
    train(tmp_path / "run", max_steps=1, overwrite=True)
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_lock_is_reusable_after_its_release(tmp_path):
    lock = FolderLock(tmp_path)
    lock.release()
    lock.release()
    FolderLock(tmp_path).release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_without_locks_are_not_locked(code, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    FolderLock(tmp_path).release()


def test_folders_that_cannot_be_written_are_not_locked(tmp_path, monkeypatch):
    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(folder_lock.os, "open", read_only)
    FolderLock(tmp_path).release()


def test_a_deleted_lock_file_is_locked_again(tmp_path, monkeypatch):
    """The run that held it has ended between opening and locking."""
    lockf = fcntl.lockf

    def lock_deleted(descriptor, kind):
        monkeypatch.setattr(fcntl, "lockf", lockf)
        (tmp_path / ".lock").unlink()
        lockf(descriptor, kind)

    monkeypatch.setattr(fcntl, "lockf", lock_deleted)
    lock = FolderLock(tmp_path)
    assert (tmp_path / ".lock").is_file()
    lock.release()
