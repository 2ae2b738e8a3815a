"""Atomic writes of folders: write to a temporary folder, flush it to disk, rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bumblebee.checkpoint import digests
from bumblebee.utils.text_files import named_errors


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder, whose files move into ``folder`` on success and are deleted on failure.

    A new ``folder`` appears complete, by one rename. In an existing one, each file is replaced atomically and other files
    are kept.

    Raises:
        OSError: a file cannot be written or renamed.
    """
    aside = start_aside(folder)
    try:
        yield aside
        put_in_place(aside, folder)
    finally:
        remove(aside)


def start_aside(folder: Path) -> Path:
    """Create an empty temporary folder next to ``folder``, on the same file system."""
    aside = folder.parent / f".{folder.name}.partial"
    remove(aside)
    aside.mkdir(parents=True)
    return aside


def put_in_place(aside: Path, folder: Path, whole: bool = False) -> None:
    """Move the contents of a temporary folder into ``folder``; see ``written_aside``.

    Args:
        aside: folder created by ``start_aside``.
        folder: the destination.
        whole: replace an existing folder with everything in it, instead of keeping its other files.
    """
    flush_tree(aside)
    if folder.exists() and not whole:
        digests.replace_digests(folder, aside)
        for file in sorted(aside.iterdir(), key=lambda file: (file.name == digests.NAME, file.name)):  # digests last
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
    """Delete a folder if it exists."""
    shutil.rmtree(aside, ignore_errors=True)


def flush(path: Path) -> None:
    """fsync a file, or a folder's directory entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with named_errors(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """fsync everything in a folder and the folder itself."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)
