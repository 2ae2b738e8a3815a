"""Writing text files: an error names the file, also one that the system reports only when the file is closed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Name a file in the OSErrors raised inside, such as those of a full disk, which have no file name.

    Raises:
        OSError: what has been raised inside, with ``filename`` set.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file's content.

    Raises:
        OSError: it cannot be written; names the file.
    """
    with named_errors(path):
        path.write_text(text, encoding="utf-8")


def append_text(path: Path, text: str) -> None:
    """Append to a file and close it.

    Raises:
        OSError: it cannot be written; names the file.
    """
    with named_errors(path), path.open("a", encoding="utf-8") as stream:
        stream.write(text)
