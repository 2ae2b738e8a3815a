"""Rewrites the words of the command line into the form that jsonargparse accepts.

--flag, --no_flag      --flag=true, --flag=false
--data.files a b       --data.files=["a", "b"]
--config a b           --config a --config b, before all other options
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

import yaml

_LISTS = ("--data.files", "--data.validation_files", "--files", "--metrics", "--device")  # a list if several values follow
_ALWAYS_LISTS = ("stop", "stop_ids", "spelled_ids")  # a list even for one value, in any group
_WITHOUT_VALUE = ("--help", "--print_config")


def fold(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Rewrite the words for the parser.

    Config files move to the front, so that an option on the command line overrides all of them wherever it is written.

    Returns:
        The words, and the options that were written without a value, which must turn out to be booleans.
    """
    words: list[str] = []
    config_files: list[str] = []
    flags: list[str] = []
    for word, values in _split_lists(_options(argv)):
        if word.split("=")[0] == "--config" and (values or "=" in word):
            config_files += [word] if "=" in word else [part for value in values for part in (word, value)]
        elif not word.startswith("--") or "=" in word:
            words += [word, *values]
        elif values and _is_list(word):
            words.append(f"{word}={json.dumps(values)}")
        elif word in _LISTS and len(values) > 1:
            words.append(f"{word}={json.dumps([_list_item(value) for value in values])}")
        elif not values and word not in _WITHOUT_VALUE:
            flags.append(word[2:].removeprefix("no_"))
            words.append(f"--{flags[-1]}={'false' if word.startswith('--no_') else 'true'}")
        else:
            words += [word, *values]
    return config_files + words, flags


def _options(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each option, or leading positional argument, with the words up to the next option."""
    index = 0
    while index < len(argv):
        end = index + 1
        while end < len(argv) and not argv[end].startswith("--"):
            end += 1
        yield argv[index], list(argv[index + 1 : end])
        index = end


def _split_lists(options: Iterable[tuple[str, list[str]]]) -> Iterator[tuple[str, list[str]]]:
    """Write ``--stop=a`` as ``--stop a``; a object list after the equals sign stays."""
    for word, values in options:
        name, equals, value = word.partition("=")
        if equals and _is_list(name) and not value.startswith("["):
            yield name, [value, *values]
        else:
            yield word, values


def _is_list(word: str) -> bool:
    return word.startswith("--") and word[2:].partition("=")[0].rpartition(".")[2] in _ALWAYS_LISTS


def _list_item(word: str) -> object:
    """Parse one value of a list: a string, or a mapping such as ``{path: a.jsonl, weight: 2}``."""
    if not word.startswith("{"):
        return word
    try:
        item: object = yaml.safe_load(word)
    except yaml.YAMLError:
        return word
    return item
