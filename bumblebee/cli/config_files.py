"""Recipes and other config files as YAML nodes: the line of a key, and the errors that make a file unusable.

Keys are written as by users, ``optimizer.lr``: in a file, ``init_args`` may come between.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from bumblebee.utils.formatting import hint


def plain(key: str) -> str:
    """Return a key as users write it, without ``init_args``."""
    return re.sub(r"(^|\.)(init_args|dict_kwargs)(?=\.|$)", "", key).lstrip(".")


def where(key: str, words: Sequence[str], named: str = "") -> str:
    """Return "FILE:LINE: " of a key or its closest parent in the last config file that sets it, "" for the command line.

    Args:
        key: the key.
        words: the command line.
        named: a class path that the key or an item of its list names, whose line is preferred.
    """
    path = plain(key).split(".")
    options = [plain(word[2:].split("=")[0]).removesuffix(".class_path").split(".") for word in words if word[:2] == "--"]
    if path[-1] == "class_path" and path[:-1] in options:  # --optimizer CLASS
        return ""
    depth_on_line = max((len(option) for option in options if path[: len(option)] == option), default=0)
    locations = [(*_locate(_parse(file), path), file) for file in reversed(config_files(words))]
    depth, line, file = max(locations, key=lambda location: location[0], default=(0, 0, ""))
    if depth <= depth_on_line:
        return ""
    return f"{file}:{_line_of(named, _parse(file), line) or line}: "


def config_files(words: Sequence[str]) -> list[str]:
    """Return the existing files named by ``--config``."""
    return [value for option, value in option_values(words) if option == "--config" and Path(value).is_file()]


def option_values(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return (option, value) of each ``--option value`` and ``--option=value``."""
    pairs = []
    for word, following in zip(words, [*words[1:], ""], strict=False):
        option, equals, value = word.partition("=")
        if option.startswith("--"):
            pairs.append((option, value if equals else following))
    return pairs


def callback_names(words: Sequence[str]) -> list[str]:
    """Return the names of the callbacks in the config files."""
    return [name for file in config_files(words) for name, _ in callbacks_in(file)]


def class_that_sets(group: str, option: str, words: Sequence[str]) -> str | None:
    """Return the class path that the last config file with an option of a group names for it; None if it names none."""
    for file in reversed(config_files(words)):
        node = _as_dict(_as_dict(_parse(file)).get(group))
        if option in node or option in _as_dict(node.get("init_args")):
            class_path = node.get("class_path")
            return class_path.value if isinstance(class_path, yaml.ScalarNode) else None
    return None


def callbacks_in(file: str) -> list[tuple[str, set[str]]]:
    """Return (name, its options and class path) of each callback in a recipe."""
    callbacks = []
    for name, node in _items(_as_dict(_parse(file)).get("callbacks")):
        options = _as_dict(node)
        class_path = [value.value for option, value in options.items() if option == "class_path"]
        callbacks.append((name, {*options, *_as_dict(options.get("init_args")), *class_path}))
    return callbacks


def problem_of_file(file: str) -> str | None:
    """Describe why a config file cannot be used: missing, not valid YAML, not a mapping, or a duplicate key."""
    path = Path(file)
    if not file:
        return "--config: expected a value"
    if path.is_dir():
        return f"--config: {file} is a folder, not a file"
    if not path.is_file():
        return f"--config: file not found: {file}{hint(file, yaml_files_beside(file))}"
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        return f"{file}{line}: invalid YAML: {error.problem}"
    except (OSError, ValueError, yaml.YAMLError) as error:
        return f"{file}: cannot read file: {error}"
    if not isinstance(node, yaml.MappingNode):
        return f"{file}: expected options such as 'seed: 42', or groups such as 'trainer:' with options below them"
    return next((f"{file}:{line}: duplicate key {name!r}" for name, line in _duplicates(node)), None)


def class_in_file(file: str) -> str | None:
    """Return the class path of a file that describes one class instead of a recipe; it may be the value of an option."""
    node = _as_dict(_parse(file)).get("class_path")
    return node.value if isinstance(node, yaml.ScalarNode) else None


def yaml_files_beside(file: str) -> list[str]:
    """Return the YAML files in a file's folder."""
    folder = Path(file).parent
    return [str(other) for other in folder.glob("*.y*ml")] if folder.is_dir() else []


def _parse(file: str) -> yaml.Node | None:
    try:
        return yaml.compose(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _items(node: yaml.Node | None) -> list[tuple[str, yaml.Node]]:
    return [(key.value, value) for key, value in node.value] if isinstance(node, yaml.MappingNode) else []


def _as_dict(node: yaml.Node | None) -> dict[str, yaml.Node]:
    return dict(_items(node))


def _line_of(value: str, node: yaml.Node | None, first: int) -> int:
    """Return the first line, from ``first`` on, on which a node below this one is this text; 0 if there is none."""
    if isinstance(node, yaml.ScalarNode):
        line = node.start_mark.line + 1
        return line if value and node.value == value and line >= first else 0
    children = [each for _, each in node.value] if isinstance(node, yaml.MappingNode) else node.value if node else []
    return next(filter(None, (_line_of(value, child, first) for child in children)), 0)


def _locate(node: yaml.Node | None, path: list[str]) -> tuple[int, int]:
    """Return how many parts of a key exist below a node, and the line of the last of them; in a list, of the first item."""
    if isinstance(node, yaml.SequenceNode):
        return max((_locate(item, path) for item in node.value), key=lambda location: location[0], default=(0, 0))
    if not isinstance(node, yaml.MappingNode) or not path:
        return 0, 0
    best = 0, 0
    for key, value in node.value:
        if key.value in ("init_args", "dict_kwargs"):
            best = max(best, _locate(value, path))
        elif key.value == path[0]:
            depth, line = _locate(value, path[1:])
            best = max(best, (1 + depth, line or key.start_mark.line + 1))
    return best


def _duplicates(node: yaml.MappingNode) -> Iterator[tuple[str, int]]:
    """Yield (key, line) of each key that occurs more than once in its mapping."""
    seen = set()
    for key, value in node.value:
        if key.value in seen:
            yield key.value, key.start_mark.line + 1
        seen.add(key.value)
        if isinstance(value, yaml.MappingNode):
            yield from _duplicates(value)
