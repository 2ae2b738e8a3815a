"""FileLock: an exclusive lock (flock) on a file, which the system releases when its holder ends, however it does."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class FileLock:
    """A held lock. ``acquire`` makes one.

    Args:
        descriptor: of the locked file; a child process that inherits it holds the lock too.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def acquire(cls, file: Path, wait: bool = False) -> FileLock | None:
        """Lock a file, which is created if needed; None if another process, or another lock of this one, holds it.

        Args:
            file: in an existing folder.
            wait: until it is free.
        """
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def release(self) -> None:
        """Unlock the file, unless a child process still holds the lock. A second call does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
