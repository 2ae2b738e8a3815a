"""From what a user names in a recipe to files: paths, lists, globs, and a helpful answer where nothing is found."""

import difflib
import glob
import os
import re
from collections.abc import Sequence

from datamodules.readers import READERS, compressed, reader_of, suffix_of

PLACEHOLDER = re.compile(r"(^|/)path/to(/|$)|<[^<>]+>|(^|[/_-])your[_-]|\.\.\.", re.IGNORECASE)


def expand(files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """The files that a path, a list of paths, or a glob means (`*`, `?`, `[...]`, and `**` for folders in folders).

    The matches of a glob are sorted; a file that is named twice is kept once, at its first place. `~` is the home
    folder.

    Raises:
        ValueError: nothing given, a path that does not exist, a placeholder, a folder, a glob without a match, or a
            file of an unsupported kind.
    """
    paths = [files] if isinstance(files, str | os.PathLike) else files
    found = [match for path in paths for match in _matches(os.fspath(path))]
    if not found:
        raise ValueError("no files were given")
    unique: dict[str, str] = {}
    for path in found:
        unique.setdefault(identity(path), path)
    return list(unique.values())


def identity(path: str) -> str:
    """What two names of the same file have in common."""
    return os.path.realpath(path)


def _matches(path: str) -> list[str]:
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        raise ValueError(f"{path!r} is a folder; name the files in it, for example {_example(path)!r}")
    if os.path.exists(path):  # first of all: a file may be called "data[1].jsonl"
        matches = [path]
    elif PLACEHOLDER.search(path.replace(os.sep, "/")):
        raise ValueError(f"{path!r} is a placeholder; put the path of your own file in its place")
    elif any(character in path for character in "*?["):
        matches = _glob(path)
    else:
        raise ValueError(_missing(path))
    for match in matches:
        reader_of(match)  # now, not an hour later when its turn comes
    return matches


def _glob(pattern: str) -> list[str]:
    matches = sorted(path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path))
    if not matches:
        raise ValueError(f"no file matches {pattern!r}")
    return matches


def _example(folder: str) -> str:
    """A glob that would find something in the folder, if anything supported is there."""
    for name in sorted(os.listdir(folder)):
        if suffix_of(name) in READERS:
            return os.path.join(folder, f"*{suffix_of(name)}{'.gz' * compressed(name)}")
    return os.path.join(folder, "*.jsonl")


def _missing(path: str) -> str:
    folder, name = os.path.split(path)
    if not os.path.isdir(folder or "."):
        return f"{path!r} does not exist, and neither does the folder {folder!r}"
    near = difflib.get_close_matches(name, os.listdir(folder or "."), n=3)
    hint = f"; did you mean {' or '.join(repr(os.path.join(folder, name)) for name in near)}?" if near else ""
    return f"{path!r} does not exist{hint}"
