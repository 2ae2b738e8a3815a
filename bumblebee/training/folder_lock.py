"""FolderLock: two runs must not write into the same output folder.

A POSIX record lock on output_dir/.lock. The system releases it when the process ends in whatever way, and worker processes that
outlive a killed run do not inherit it, as they would a lock by ``flock``. Where a file system has no locks, there is none.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

NAME = ".lock"
_HELD_BY_OTHERS = (errno.EACCES, errno.EAGAIN)  # both are allowed by POSIX
_held: set[Path] = set()  # by this process, to which its own locks are invisible


class FolderInUse(ValueError):
    """Another run writes into the folder."""


class FolderLock:
    """The lock of one run on an existing folder.

    Args:
        folder: to lock.

    Raises:
        FolderInUse: another run has locked it; the message names its process.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder.resolve() / NAME
        self._descriptor = _open_locked(self._file)
        if self._descriptor is not None:
            _held.add(self._file)

    def release(self) -> None:
        """Delete the file and unlock the folder. A second call does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            _held.discard(self._file)
            with suppress(OSError):  # the folder may have been deleted
                self._file.unlink()  # before unlocking it: the next run's file is another one
            os.close(descriptor)


def _open_locked(file: Path) -> int | None:
    """Open and lock the file; None if it cannot be created, or not be locked."""
    if file in _held:
        raise _in_use(file)
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            return None
        try:
            locked = _lock(descriptor, file)
        except BaseException:
            os.close(descriptor)
            raise
        if not locked:
            os.close(descriptor)
            return None
        if _is_at(descriptor, file):
            with suppress(OSError):  # a full disk: the message of the other run lacks our process
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return descriptor
        os.close(descriptor)  # a run that ended meanwhile has deleted the file that we have locked


def _lock(descriptor: int, file: Path) -> bool:
    """Lock a file; returns whether its file system has locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD_BY_OTHERS:
            raise _in_use(file) from error
        return False
    return True


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _in_use(file: Path) -> FolderInUse:
    owner = f"process {os.getpid()}, this one" if file in _held else ""
    with suppress(OSError):  # not the file that this process has locked: closing it would unlock it
        owner = owner or file.read_text(encoding="utf-8", errors="replace")
    return FolderInUse(
        f"output_dir: {file.parent} is in use by another run ({owner or 'of an unknown process'}):"
        " wait until it has ended, or choose another folder"
    )
