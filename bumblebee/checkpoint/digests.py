"""SHA256SUMS: the SHA-256 of every file of a checkpoint or model folder, which ``sha256sum -c SHA256SUMS`` checks as well.

Digests of weights and training state are computed while the files are written. Before these files are read again by a resume,
a consolidation or a merge, they are compared. Files that people edit, such as config.json, are listed, but not compared.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from bumblebee.utils.json_files import read_json, write_json
from bumblebee.utils.text_files import write_text

NAME = "SHA256SUMS"
LARGE_FILE = 1 << 26  # bytes; the digests of larger files are remembered


def file_digest(file: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def remembered_digest(path: str | Path, memory: Path) -> str:
    """``file_digest``, which reads a large file again only if its path, size or times have changed.

    Args:
        path: the file.
        memory: folder with what is remembered; if it cannot be written, nothing is.
    """
    path = Path(path)
    state = path.stat()
    if state.st_size < LARGE_FILE:
        return file_digest(path)
    real = os.path.realpath(path)
    identity = [real, state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
    entry = memory / f"{hashlib.sha256(real.encode()).hexdigest()[:20]}.json"
    try:
        stored = read_json(entry)
    except (OSError, ValueError):  # absent or damaged
        stored = {}
    if stored.get("file") == identity and re.fullmatch("[0-9a-f]{64}", str(stored.get("digest"))):
        return str(stored["digest"])
    digest = file_digest(path)
    with suppress(OSError):
        memory.mkdir(parents=True, exist_ok=True)
        write_json(entry, {"file": identity, "digest": digest})
    return digest


def write_digests(folder: Path, known: Mapping[str, str]) -> None:
    """Write the digests of all files in a folder.

    Args:
        folder: its files are complete.
        known: by path relative to the folder, for files whose digest is known; other files are read.
    """
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != NAME)
    names = {file.relative_to(folder).as_posix(): file for file in files}
    _write(folder, {name: known.get(name) or file_digest(file) for name, file in names.items()})


def read_digests(folder: Path) -> dict[str, str] | None:
    """Read the digests of a folder's files, by path relative to it; None if it has none, as in older checkpoints.

    Raises:
        ValueError: a line is malformed.
    """
    if not (folder / NAME).is_file():
        return None
    digests = {}
    for number, line in enumerate((folder / NAME).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if match is None:
            raise ValueError(f"{folder / NAME}:{number} is damaged: expected a SHA-256 and a file name")
        digests[match[2]] = match[1]
    return digests


def describe_damage(folder: Path, names: Iterable[str]) -> str | None:
    """Compare files with their digests; return what is wrong with the first that differs, or None if there is nothing.

    Args:
        folder: without digests, nothing is compared.
        names: paths of files relative to the folder.
    """
    try:
        digests = read_digests(folder)
    except ValueError as error:
        return str(error)
    if digests is None:
        return None
    for name in names:
        if name not in digests:
            return f"{folder / name} is not listed in {NAME}"
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
        if file_digest(folder / name) != digests[name]:
            return f"{folder / name} is damaged: its SHA-256 differs from the one in {NAME}"
    return None


def replace_digests(folder: Path, aside: Path) -> None:
    """Prepare for moving the files of ``aside`` into an existing folder: neither may end up with the digest of another file.

    The folder's digests of the files to replace are deleted first, so that there is no wrong one at any time. The digests in
    ``aside`` are extended by the remaining ones.
    """
    new = {file.relative_to(aside).as_posix() for file in aside.rglob("*")}
    kept = forget_digests(folder, new)
    if (aside / NAME).is_file():
        _write(aside, {**kept, **(read_digests(aside) or {})})


def forget_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Delete the digests of files that are about to be replaced or deleted, and return the remaining ones."""
    try:
        digests = read_digests(folder)
    except ValueError:  # a damaged list is replaced
        digests = {}
    if digests is None:
        return {}
    forgotten = set(names)
    kept = {name: digest for name, digest in digests.items() if name not in forgotten}
    if kept != digests:
        _write(folder, kept)
    return kept


def _write(folder: Path, digests: Mapping[str, str]) -> None:
    temporary = folder / f".{NAME}.partial"
    write_text(temporary, "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)))
    os.replace(temporary, folder / NAME)
