"""Rewrites the words of the command line into the form that jsonargparse accepts.

--flag, --no_flag      --flag=true, --flag=false
--data.files a b       --data.files=["a", "b"]
--stop a               --stop=["a"], because the option's type is a list
--config a b           --config a --config b, before all other options
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args, get_origin

import yaml

_WITHOUT_VALUE = ("--help", "--print_config")


@dataclass(frozen=True)
class ListOption:
    """An option whose values may be written one after another.

    Args:
        item: type of the values.
        always: one value is a list too; otherwise the option also accepts a plain value.
    """

    item: type
    always: bool


# Options of the classes that a recipe names, which the parser learns only from the recipe.
_OF_RECIPES = {f"--data.{name}": ListOption(str, always=False) for name in ("files", "validation_files")}


def list_options(actions: Iterable[argparse.Action]) -> dict[str, ListOption]:
    """Return the options of a parser whose type is a list of strings or integers, by their word on the command line."""
    options = {}
    for action in actions:
        kind = getattr(action, "_typehint", action.type)
        kinds = get_args(kind) if get_origin(kind) is not list else (kind,)
        items = [get_args(each)[0] for each in kinds if get_origin(each) is list]
        if items and items[0] in (str, int):
            options[f"--{action.dest}"] = ListOption(items[0], always=items[0] not in kinds)
    return options


def fold(argv: Sequence[str], lists: Mapping[str, ListOption] | None = None) -> tuple[list[str], list[str]]:
    """Rewrite the words for the parser.

    Config files move to the front, so that an option on the command line overrides all of them wherever it is written.

    Args:
        argv: the words after the command.
        lists: the parser's ``list_options``.

    Returns:
        The words, and the options that were written without a value, which must turn out to be booleans.
    """
    words: list[str] = []
    config_files: list[str] = []
    flags: list[str] = []
    lists = {**_OF_RECIPES, **(lists or {})}
    for word, values in _split_lists(_options(argv), lists):
        option = lists.get(word)
        if word.split("=")[0] == "--config" and (values or "=" in word):
            config_files += [word] if "=" in word else [part for value in values for part in (word, value)]
        elif not word.startswith("--") or "=" in word:
            words += [word, *values]
        elif option and option.always and values:
            words.append(f"{word}={values[0] if _is_list(word, values, option.item) else json.dumps(values)}")
        elif option and len(values) > 1:
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


def _split_lists(options: Iterable[tuple[str, list[str]]], lists: Mapping[str, ListOption]) -> Iterator[tuple[str, list[str]]]:
    """Write ``--stop=a`` as ``--stop a``; a list after the equals sign stays."""
    for word, values in options:
        name, equals, value = word.partition("=")
        if equals and name in lists and lists[name].always and not value.startswith("["):
            yield name, [value, *values]
        else:
            yield word, values


def _is_list(word: str, values: Sequence[str], item: type) -> bool:
    """Whether the only value is the whole list: ``[a, b]`` as in a recipe. A stop string may be ``[INST]``: JSON only there."""
    if len(values) != 1 or not (values[0].startswith("[") and values[0].endswith("]")):
        return False
    if not word.endswith("stop"):
        return True
    try:
        return all(type(each) is item for each in json.loads(values[0]))
    except ValueError:
        return False


def _list_item(word: str) -> object:
    """Parse one value of a list: a string, or a mapping such as ``{path: a.jsonl, weight: 2}``."""
    if not word.startswith("{"):
        return word
    try:
        item: object = yaml.safe_load(word)
    except yaml.YAMLError:
        return word
    return item
