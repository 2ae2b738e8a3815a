"""ValueErrors of constructors and of setting up, reported as user errors that name the option and where it was set."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from jsonargparse import Namespace

from bumblebee.cli.config_files import plain, where
from bumblebee.cli.errors.parse_errors import reason
from bumblebee.cli.errors.reporting import fail, message_of, run_errors


@contextmanager
def user_errors(config: Namespace, words: Sequence[str], until: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Report invalid values and unusable files as user errors. For building and setting up, not for training.

    Args:
        config: the parsed options, by group.
        words: the command line, to report where an option was set.
        until: once it returns True, a ValueError is a bug and keeps its traceback.
    """
    try:
        with run_errors():
            yield
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        if until() or os.environ.get("BUMBLEBEE_TRACEBACK"):
            raise
        fail(name_option(message_of(error), config.as_dict(), words))


def name_option(message: str, config: Mapping[str, object], words: Sequence[str]) -> str:
    """Prefix a message with the option that it is about: one whose name it begins with, or whose value it mentions.

    Args:
        message: of a ValueError.
        config: the parsed options, by group.
        words: the command line.
    """
    if "Union subtypes" in message:  # wrapped by jsonargparse
        message = reason(message)
    if (named := re.match(r"(\w+(?:\.\w+)+): ", message)) and named[1] in _lists(config):
        return where(named[1], words) + message
    candidates = []
    for key, value in _leaves(config):
        name = plain(key).rpartition(".")[2]
        if _begins_with(plain(key), message) or _begins_with(name, message):
            candidates.append((0 if str(value) in message else 1, key))
        elif isinstance(value, str) and value and (position := _position(value, message)) is not None:
            candidates.append((2 + position, key))
    if not candidates:
        return message
    key = min(candidates)[1]
    parent, _, name = plain(key).rpartition(".")
    if message.startswith(plain(key)):
        return where(key, words) + message
    if _begins_with(name, message):
        return f"{where(key, words)}{parent}.{message}"
    return f"{where(key, words)}{plain(key)}: {message}"


def _begins_with(option: str, message: str) -> bool:
    """Whether a message begins with an option's name; "folder not found: x" is not about an option named folder."""
    return re.match(rf"{re.escape(option)}\b(?!/)(?! not found: )", message) is not None


def _position(value: str, message: str) -> int | None:
    """Index at which a message mentions a value: at its beginning, in quotes, or as a file or folder that was not found."""
    match = re.match(rf"((file|folder) not found: )?{re.escape(value)}(?![\w/.-])", message)
    match = match or re.search(rf"(['\"]){re.escape(value)}\1", message)
    return match.start() if match else None


def _lists(value: object, path: str = "") -> Iterator[str]:
    """Keys of lists, such as task.rewards."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _lists(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        yield plain(path)


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of everything that has no keys below it."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for item in value:  # an item that is not a class, such as a file with its weight, is one value
            yield from _leaves(item, path) if isinstance(item, Mapping) and "class_path" in item else [(path, item)]
    else:
        yield path, value
