"""Writing so that a reader sees all of it or nothing: write aside, flush to the disk, rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside ``folder``; on success its files take their place in ``folder``, on failure they vanish.

    A ``folder`` that does not exist appears complete, by one rename. In one that exists each file is replaced as a whole,
    so that files of other kinds beside them stay.

    Raises:
        OSError: from the body or the renaming.
    """
    aside = start_aside(folder)
    try:
        yield aside
        put_in_place(aside, folder)
    finally:
        remove(aside)


def start_aside(folder: Path) -> Path:
    """An empty folder beside ``folder``, on the same disk."""
    aside = folder.parent / f".{folder.name}.partial"
    remove(aside)
    aside.mkdir(parents=True)
    return aside


def put_in_place(aside: Path, folder: Path, whole: bool = False) -> None:
    """Make what was written aside the folder's content; see ``written_aside``.

    Args:
        aside: what ``start_aside`` gave, filled.
        folder: where it belongs.
        whole: a folder that is there vanishes with everything in it, instead of keeping its other files.
    """
    flush_tree(aside)
    if folder.exists() and not whole:
        for file in sorted(aside.iterdir()):
            os.replace(file, folder / file.name)
        flush(folder)
        aside.rmdir()
    else:
        old = folder.parent / f".{folder.name}.old.partial"
        if folder.exists():
            remove(old)
            os.rename(folder, old)
        os.rename(aside, folder)
        remove(old)
    flush(folder.parent)


def remove(aside: Path) -> None:
    """Delete a folder that may not be there."""
    shutil.rmtree(aside, ignore_errors=True)


def flush(path: Path) -> None:
    """Ask the system to put a file's content, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """``flush`` for everything in a folder and the folder itself."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)
