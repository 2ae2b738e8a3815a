"""What went wrong on the command line, in one line: the key as it is written, its recipe and line, the value, what is right.

jsonargparse's messages are trees: ``Parser key "data":`` with indented lines under it, which may hold ``Parser key "files":``
and so on. What matters is the path of keys and what is said below the last one.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from pydoc import locate
from typing import Any, get_type_hints

from bumblebee.cli.config_files import callbacks_in, pairs, plain, recipes, recipes_beside, where
from bumblebee.formatting import did_you_mean, hint

_KEY = re.compile(r'Parser key "([^"]+)":')
_UNKNOWN = re.compile(
    r"(?:Group '(?P<group>[^']+)' does not accept option|Option) '(?P<option>[^']+)'"
    r"|[Uu]nrecognized arguments?: (?:--(?P<word>[^\s=]+)|(?P<value>\S+))"
)
_CLASS = re.compile(r"class_path[ =]'([\w.]+)'")
_WRONG_KIND = re.compile(
    r"path ?'?([\w.]*)'? does not correspond to a subclass of (\w+)|'([\w.]+)' to be a subclass of <class '(\w+)'>"
)
_NOT_OPTIONS = ("params", "args", "kwargs")  # what an optimizer is given by the trainer, and what has no names
_NOT_LISTED = ("help", "print_config", "print_shtab")  # each command's, and of no use where another option was meant
_PLAIN_TYPES = {
    "<class 'int'>": "a whole number", "<class 'float'>": "a number", "<class 'str'>": "text", "<class 'NoneType'>": "null",
    "<class 'bool'>": "true or false", "<class 'dict'>": "options under it", "<class 'list'>": "a list",
    "<class 'tuple'>": "a list",
}  # fmt: skip

_IN_YAML = {"None": "null", "True": "true", "False": "false"}


# -- what jsonargparse says ----------------------------------------------------------------------------------------------


def explain(message: str, words: list[str], names: Iterable[str] = ()) -> str:
    """A message of jsonargparse in one line.

    Args:
        message: of any number of lines.
        words: what was written on the command line.
        names: the parser's options.
    """
    keys, said = _last_key(message)
    if unknown := _UNKNOWN.search(said):
        if value := unknown["value"]:
            return f"{value!r} belongs to no option: {_option_for(value, set(names))}"
        return _explain_unknown(unknown, keys, message, words, list(names))
    key = _complete(keys, said, words)
    if missing := re.search(r"the following arguments are required: (.*)", said):
        absent = [plain(f"{key}.{name}" if key else name) for name in missing[1].split(", ")]
        recipe = "" if recipes(words) or "task" not in absent else ": name a recipe, such as --config recipes/pretrain.yaml"
        return f"{where(key, words)}{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing{recipe}"
    return f"{where(key, words)}{plain(key) + ': ' if key else ''}{reason(said)}"


def _last_key(message: str) -> tuple[list[str], str]:
    """The path of keys, and the lines that are indented below the last one."""
    found = list(_KEY.finditer(message))
    if not found:
        return [], message
    begin = message.rfind("\n", 0, found[-1].start()) + 1
    indent = re.match(r"[ -]*", message[begin:])
    assert indent
    lines = message[found[-1].end() :].split("\n")
    inside = [lines[0]]
    for line in lines[1:]:
        if line.strip() and len(line) - len(line.lstrip(" ")) <= indent.end():
            break
        inside.append(line)
    keys = [match[1] for match in found]
    return [key for key, before in zip(keys, [None, *keys], strict=False) if key != before], "\n".join(inside)


def reason(said: str) -> str:
    """What is wrong, without the boiler plate around it."""
    file = re.search(r"[\w./~-]+\.ya?ml\b", said)
    if file and not Path(file[0]).exists():
        return f"{file[0]} is not there" + hint(file[0], recipes_beside(file[0]))
    if kind := _WRONG_KIND.search(said):
        return f"{kind[1] or kind[3] or _value(said).removeprefix(', got ')} is no {kind[2] or kind[4]}"
    kinds = re.findall(r"Expected an? (<class '\w+'>|typing\.Literal\[.*?\]|tuple with \d+ elements)", said)
    no_path = "dot import path" in said and set(kinds) <= {"<class 'NoneType'>"}
    base = re.search(r"Not a valid subclass of (\w+)" + r"|Subtypes: \[<class '[\w.]*?(\w+)'>" * no_path, said)
    if base:
        return f"expected the class_path of a {base[1] or base[2]}{_value(said)}"
    if unread := re.search(r"Unable to load config ['\"](.+?)['\"]", said):
        return f"expected options under it, or a file with them, got {unread[1]}"
    if absent := re.search(r"(?:module '([\w.]+)' has no attribute '(\w+)'|No module named '([\w.]+)')", said):
        return _explain_absent(absent[1], absent[2], absent[3])
    told = [line for line in (line.strip(" -") for line in said.splitlines()) if line and not _boiler_plate(line)]
    if told or not kinds:
        return " ".join(told) or " ".join(said.split())
    return f"expected {_or(_in_words(kind) for kind in kinds)}{_value(said)}"


def _boiler_plate(line: str) -> bool:
    return line.startswith(
        ("Does not validate", "Subtypes", "Error", "Given value", "Expected a", "Problem with", "Parser key")
    )


def _explain_absent(module: str | None, name: str | None, missing: str | None) -> str:
    if module is None:
        return f"there is no Python module {missing!r}"
    home = import_module(module)
    classes = {name for name in dir(home) if inspect.isclass(getattr(home, name, None))} | set(getattr(home, "__all__", []))
    return f"{module} has no {name!r}" + hint(str(name), sorted(classes))


def _in_words(kind: str) -> str:
    if kind.startswith("typing.Literal"):
        return _or(kind[len("typing.Literal[") : -1].replace("'", "").split(", "))
    return _PLAIN_TYPES.get(kind) or kind.replace("tuple with", "a list of")


def _or(parts: Iterable[str]) -> str:
    unique = list(dict.fromkeys(parts))
    return " or ".join(filter(None, [", ".join(unique[:-1]), unique[-1]]))


def _value(said: str) -> str:
    value = re.search(r"(?:Given|Got) value: (.*?)(?:\. Got value: .*)?$", said, re.MULTILINE)
    nested = re.search(r"val='(.*)'\)", value[1]) if value else None
    text = nested[1] if nested else value[1] if value else ""
    return "" if not text or text.startswith(("{", "Namespace(")) else f", got {_IN_YAML.get(text, text)}"


def _explain_unknown(unknown: re.Match[str], keys: list[str], message: str, words: list[str], options: list[str]) -> str:
    path = [*filter(None, [unknown["group"]]), *(unknown["word"] or unknown["option"]).split(".")]
    classes = _CLASS.findall(message)
    if not classes:
        key = ".".join([*keys, *path])
        return f"{where(key, words)}unknown option {plain(key)!r}{_nearest(plain(key), options)}"
    path = [part for part in path if part != "init_args"]
    known = _parameters(classes[-1])
    depth = 1
    if path[0] in known:  # a dataclass, and what is unknown is one of its fields
        known, depth = _parameters(classes[-1], path[0]), 2
    key = plain(_complete([*keys, *path[:depth]], message, words))
    if not known:
        return f"{where(key, words)}unknown option {key!r}: {classes[-1]} takes none; is a class_path missing?"
    parent = key.rpartition(".")[0]
    return f"{where(key, words)}unknown option {key!r}{_nearest(key, [f'{parent}.{name}' for name in known])}"


def _option_for(value: str, names: set[str]) -> str:
    """How to write a value that stands alone on the command line."""
    for option, meant in (("model", Path(value).is_dir()), ("config", value.endswith((".yaml", ".yml")))):
        if meant and option in names:
            return f"write --{option} {value}"
    return "write --NAME VALUE, and quotes around a value with spaces; --help lists the options"


def _nearest(key: str, known: list[str]) -> str:
    """The names beside a key that are most like it; where none is, all of them. Of a group that is none, the groups."""
    parent, _, name = key.rpartition(".")
    beside = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == parent]
    if not beside:
        parent, name, beside = "", key.split(".")[0], list(dict.fromkeys(other.split(".")[0] for other in known))
    near = difflib.get_close_matches(name, beside, n=2, cutoff=0.7)
    full = [f"{parent}.{other}" if parent else other for other in near]
    return did_you_mean(full) or f"; there are {', '.join(name for name in beside if name not in _NOT_LISTED)}"


def _parameters(class_path: str, group: str | None = None) -> list[str]:
    """What a class takes, or what the dataclass takes that is its parameter ``group``."""
    made: Any = locate(class_path)
    if group is not None:
        made = hints_of(made).get(group)
    if not callable(made):
        return []
    return [name for name in inspect.signature(made).parameters if name not in _NOT_OPTIONS]


def hints_of(made: Any) -> dict[str, Any]:
    """The types of what a class or function takes; nothing where they cannot be told."""
    try:
        return get_type_hints(made.__init__ if inspect.isclass(made) else made)
    except (NameError, TypeError):
        return {}


def _complete(keys: list[str], said: str, words: list[str]) -> str:
    """The whole key. jsonargparse leaves out which callback it means: it is the one that has the option, or the class."""
    if keys[:1] != ["callbacks"]:
        return ".".join(keys)
    on_line = (re.match(r"--callbacks\.(\w+)(?:\.init_args)?(?:\.(\w+))?(?:=(.*))?$", f"{a}={b}") for a, b in pairs(words))
    given = [(match[1], {match[2], match[3]}) for match in on_line if match]
    given += [callback for file in recipes(words) for callback in callbacks_in(file)]
    option = keys[1] if len(keys) > 1 else None
    fitting = [name for name, has in given if (option in has if option else any(str(text) in said for text in has if text))]
    return ".".join(["callbacks", *fitting[:1], *keys[1:]])


# -- what a class or a run says ------------------------------------------------------------------------------------------


def explain_refusal(message: str, config: dict[str, Any], words: list[str]) -> str:
    """A ValueError in one line, with the option that it speaks of.

    It speaks of an option whose name it begins with, or whose value.

    Args:
        message: what a constructor or the setting up raised.
        config: the options, by group.
        words: what was written on the command line.
    """
    if "Union subtypes" in message:  # jsonargparse has wrapped it
        message = reason(message)
    spoken = []
    for key, value in _leaves(config):
        name = plain(key).rpartition(".")[2]
        if re.match(rf"({re.escape(plain(key))}|{re.escape(name)})\b(?!/)", message):
            spoken.append((0 if str(value) in message else 1, key))
        elif isinstance(value, str) and value and (at := _place(value, message)) is not None:
            spoken.append((2 + at, key))
    if not spoken:
        return message
    key = min(spoken)[1]
    parent, _, name = plain(key).rpartition(".")
    if message.startswith(plain(key)):
        return where(key, words) + message
    if re.match(rf"{re.escape(name)}\b", message):
        return f"{where(key, words)}{parent}.{message}"
    return f"{where(key, words)}{plain(key)}: {message}"


def _place(value: str, message: str) -> int | None:
    """Where a message speaks of a value: at its beginning, or in quotes."""
    match = re.match(rf"{re.escape(value)}(?![\w/.-])", message) or re.search(rf"(['\"]){re.escape(value)}\1", message)
    return match.start() if match else None


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that has no keys of its own."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for item in value:  # an entry that is no class, such as a file with its weight, is one value
            yield from _leaves(item, path) if isinstance(item, dict) and "class_path" in item else [(path, item)]
    else:
        yield path, value
