"""Recipes as files: where a key stands in one, and what keeps a file from being one.

A key is named as its user writes it, ``optimizer.lr``; in the file ``init_args`` may stand between.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from bumblebee.formatting import hint


def plain(key: str) -> str:
    """The key as a user writes it: without ``init_args``."""
    return re.sub(r"(^|\.)(init_args|dict_kwargs)(?=\.|$)", "", key).lstrip(".")


def where(key: str, words: list[str]) -> str:
    """ "FILE:LINE: " of a key, or of what it belongs to, in the last recipe that has it; nothing for the command line."""
    path = plain(key).split(".")
    written = [plain(word[2:].split("=")[0]).removesuffix(".class_path").split(".") for word in words if word[:2] == "--"]
    on_line = max((len(option) for option in written if path[: len(option)] == option), default=0)
    places = [(*_place_in(_read(file), path), file) for file in reversed(recipes(words))]
    depth, line, file = max(places, key=lambda place: place[0], default=(0, 0, ""))
    return f"{file}:{line}: " if depth > on_line else ""


def recipes(words: list[str]) -> list[str]:
    """The files named by ``--config``."""
    return [value for option, value in pairs(words) if option == "--config" and Path(value).is_file()]


def pairs(words: list[str]) -> list[tuple[str, str]]:
    """(option, value) of ``--option value`` and ``--option=value``."""
    found = []
    for word, following in zip(words, [*words[1:], ""], strict=False):
        option, equals, value = word.partition("=")
        if option.startswith("--"):
            found.append((option, value if equals else following))
    return found


def _read(file: str) -> yaml.Node | None:
    try:
        return yaml.compose(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _entries(node: yaml.Node | None) -> list[tuple[str, yaml.Node]]:
    return [(key.value, value) for key, value in node.value] if isinstance(node, yaml.MappingNode) else []


def _entries_of(node: yaml.Node | None) -> dict[str, yaml.Node]:
    return dict(_entries(node))


def _place_in(node: yaml.Node | None, path: list[str]) -> tuple[int, int]:
    """How many names of a key are there, and the line of the last of them."""
    if not isinstance(node, yaml.MappingNode) or not path:
        return 0, 0
    best = 0, 0
    for key, value in node.value:
        if key.value in ("init_args", "dict_kwargs"):
            best = max(best, _place_in(value, path))
        elif key.value == path[0]:
            depth, line = _place_in(value, path[1:])
            best = max(best, (1 + depth, line or key.start_mark.line + 1))
    return best


def names_of_callbacks(words: list[str]) -> list[str]:
    """The callbacks that the recipes name."""
    return [name for file in recipes(words) for name, _ in callbacks_in(file)]


def callbacks_in(file: str) -> list[tuple[str, set[str]]]:
    """(name, its options and class path) of the callbacks of a recipe."""
    found = []
    for name, node in _entries(_entries_of(_read(file)).get("callbacks")):
        options = _entries_of(node)
        kind = [value.value for option, value in options.items() if option == "class_path"]
        found.append((name, {*options, *_entries_of(options.get("init_args")), *kind}))
    return found


def problem_of_recipe(file: str) -> str | None:
    """What keeps a file from being a recipe at all: it is not there, is no YAML, or says one thing twice."""
    path = Path(file)
    if not file:
        return "--config: expected a value after it"
    if not path.is_file():
        return f"--config: {file} is {'a folder' if path.is_dir() else 'not there'}{hint(file, recipes_beside(file))}"
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        return f"{file}{line}: not valid YAML: {error.problem}"
    except (OSError, ValueError, yaml.YAMLError) as error:
        return f"{file}: cannot be read: {error}"
    if not isinstance(node, yaml.MappingNode):
        return f"{file}: no recipe: expected lines such as seed: 42, or groups such as trainer: with lines under them"
    return next((f"{file}:{line}: {name!r} is there twice" for name, line in _twice(node)), None)


def recipes_beside(file: str) -> list[str]:
    """The YAML files in a file's folder."""
    folder = Path(file).parent
    return [str(other) for other in folder.glob("*.y*ml")] if folder.is_dir() else []


def _twice(node: yaml.MappingNode) -> Iterator[tuple[str, int]]:
    seen = set()
    for key, value in node.value:
        if key.value in seen:
            yield key.value, key.start_mark.line + 1
        seen.add(key.value)
        if isinstance(value, yaml.MappingNode):
            yield from _twice(value)
