"""jsonargparse's error messages in one line: file and line, key, value, and what would be valid.

jsonargparse's messages are trees: ``Parser key "data":`` with indented lines below it, which may contain further
keys. What matters is the path of keys and the text below the last one.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Collection, Iterable, Sequence
from importlib import import_module
from pathlib import Path

import yaml

from bumblebee.cli.config_files import callbacks_in, config_files, option_values, plain, where, yaml_files_beside
from bumblebee.cli.errors.renamed import ELSEWHERE, ELSEWHERE_IN_GRPO
from bumblebee.cli.errors.renamed import OPTIONS as RENAMED
from bumblebee.cli.signatures import parameter_names
from bumblebee.utils.formatting import did_you_mean, hint

_KEY = re.compile(r'Parser key "([^"]+)":')
_UNKNOWN = re.compile(
    r"(?:Group '(?P<group>[^']+)' does not accept option|Option) '(?P<option>[^']+)'"
    r"|[Uu]nrecognized arguments?: (?:--(?P<word>[^\s=]+)|(?P<value>\S+))"
)
_CLASS = re.compile(r"class_path[ =]'([\w.]+)'")
_NOT_A_SUBCLASS = re.compile(
    r"path ?'?([\w.]*)'? does not correspond to a subclass of (\w+)|'([\w.]+)' to be a subclass of <class '(\w+)'>"
)
# With the class, if it is an item of a list such as task.rewards.
_MISSING = re.compile(
    r"the following arguments are required: (.*?)(?:\. Got value: (?:Namespace\(class_path='([\w.]+)')?.*)?$", re.MULTILINE
)
_NO_ATTRIBUTE = re.compile(r"(?:module '([\w.]+)' has no attribute '(\w+)'|No module named '([\w.]+)')")
_EXPECTED_TYPE = re.compile(r"Expected an? (<class '\w+'>|typing\.Literal\[.*?\]|tuple with \d+ elements)")
_NOT_LISTED = ("help", "print_config", "print_shtab")  # options of every command
_PLAIN_TYPES = {
    "<class 'int'>": "an integer", "<class 'float'>": "a number", "<class 'str'>": "a string", "<class 'NoneType'>": "null",
    "<class 'bool'>": "true or false", "<class 'dict'>": "a mapping of options", "<class 'list'>": "a list",
    "<class 'tuple'>": "a list",
}  # fmt: skip
_IN_YAML = {"None": "null", "True": "true", "False": "false"}


def explain(message: str, words: Sequence[str], options: Iterable[str] = (), arguments: Collection[str] = ()) -> str:
    """Reduce a message of jsonargparse to one line.

    Args:
        message: any number of lines.
        words: the command line.
        options: the parser's options and arguments.
        arguments: those that are written without a name.
    """
    keys, text = _last_key(message)
    if unknown := _UNKNOWN.search(text):
        if argument := unknown["value"]:
            return f"unexpected argument {argument!r}{_option_for(argument, set(options))}"
        return _explain_unknown(unknown, keys, message, words, list(options))
    key = _complete(keys, text, words)
    if missing := _MISSING.search(text):
        names = [plain(f"{key}.{name}" if key else name) for name in missing[1].split(", ")]
        kind = "argument" if set(names) & set(arguments) else "option"
        return _explain_missing(names, key, words, kind, missing[2] or "")
    absent = _NO_ATTRIBUTE.search(text)
    named = f"{absent[1]}.{absent[2]}" if absent and _may_be_function(key) else ""  # an item of a list
    return f"{where(key, words, named)}{plain(key) + ': ' if key else ''}{reason(text, key)}"


def _last_key(message: str) -> tuple[list[str], str]:
    """Return the path of keys, and the lines that are indented below the last one."""
    matches = list(_KEY.finditer(message))
    if not matches:
        return [], message
    begin = message.rfind("\n", 0, matches[-1].start()) + 1
    indent = re.match(r"[ -]*", message[begin:])
    assert indent
    lines = message[matches[-1].end() :].split("\n")
    inside = [lines[0]]
    for line in lines[1:]:
        if line.strip() and len(line) - len(line.lstrip(" ")) <= indent.end():
            break
        inside.append(line)
    keys = [match[1] for match in matches]
    return [key for key, previous in zip(keys, [None, *keys], strict=False) if key != previous], "\n".join(inside)


# -- invalid values ------------------------------------------------------------------------------------------------------


def reason(text: str, key: str = "") -> str:
    """Return what is wrong with a value, without jsonargparse's boilerplate."""
    file = re.search(r"[\w./~-]+\.ya?ml\b", text)
    if file and not Path(file[0]).exists():
        return f"file not found: {file[0]}{hint(file[0], yaml_files_beside(file[0]))}"
    if wrong := _NOT_A_SUBCLASS.search(text):
        return f"{wrong[1] or wrong[3] or _value(text)} is not {_with_article(wrong[2] or wrong[4])}"
    if other := re.search(r"Unexpected import object .*\. Got value: ([\w.]+)", text):
        return f"{other[1]} is neither a function nor a class"
    if passive := re.search(r"Expected '([\w.]+)' to be a class that instantiates into callable", text):
        return f"objects of {passive[1]} cannot be called: the class has no method __call__"
    types = _EXPECTED_TYPE.findall(text)
    not_a_path = "dot import path" in text and set(types) <= {"<class 'NoneType'>"}
    base = re.search(r"Not a valid subclass of (\w+)" + r"|Subtypes: \[<class '[\w.]*?(\w+)'>" * not_a_path, text)
    if base:
        return f"expected the class_path of {_with_article(base[1] or base[2])}{_got(text)}{_shipped(key, _value(text))}"
    if not types and (bare := re.search(r"Expected a dot import path string: (\S*)", text)):
        return f"expected a class path, got {_quoted(bare[1])}{_shipped(key, bare[1])}"
    if unread := re.search(r"Unable to load config ['\"](.+?)['\"]", text):
        return f"expected a mapping of options or a YAML file, got {_quoted(unread[1])}"
    if absent := _NO_ATTRIBUTE.search(text):
        return _explain_absent(absent[1], absent[2], absent[3], key)
    lines = [line for line in (line.strip(" -") for line in text.splitlines()) if line and not _is_boilerplate(line)]
    if lines or not types:
        return " ".join(lines) or " ".join(text.split())
    return f"expected {_or(word for kind in types for word in _type_in_words(kind))}{_got(text)}"


def _is_boilerplate(line: str) -> bool:
    return line.startswith(
        ("Does not validate", "Subtypes", "Error", "Given value", "Expected a", "Problem with", "Parser key")
    )


def _explain_absent(module: str | None, name: str | None, missing: str | None, key: str) -> str:
    if module is None:
        return f"no module named {missing!r}"
    home = import_module(module)
    functions_too = _may_be_function(key)
    known = {
        name for name in dir(home)
        if inspect.isclass(value := getattr(home, name, None)) or (functions_too and inspect.isfunction(value))
    } | set(getattr(home, "__all__", []))  # fmt: skip
    near = hint(str(name), sorted(known))
    return f"{module} has no {'class or function' if functions_too else 'class'} {name!r}{near or _shipped(key)}"


def _group(key: str) -> str | None:
    from bumblebee.cli.shipped_classes import group_of  # imports torch

    return group_of(plain(key))


def _may_be_function(key: str) -> bool:
    """Whether a key may name a function, as task.rewards may."""
    return _group(key) in (None, "task.rewards")


def _shipped(key: str, name: str = "") -> str:
    """Suggest the shipped classes of the group that a key belongs to: those of a similar name, else all."""
    from bumblebee.cli.shipped_classes import named_like, shipped  # imports torch

    group = _group(key)
    if group is None:
        return ""
    return did_you_mean(named_like(group, name)) or f"; shipped classes: {', '.join(shipped(group))}"


def _type_in_words(kind: str) -> list[str]:
    if kind.startswith("typing.Literal"):
        return kind[len("typing.Literal[") : -1].replace("'", "").split(", ")
    return [_PLAIN_TYPES.get(kind) or kind.replace("tuple with", "a list of")]


def _or(parts: Iterable[str]) -> str:
    unique = list(dict.fromkeys(parts))
    return " or ".join(filter(None, [", ".join(unique[:-1]), unique[-1]]))


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _got(text: str) -> str:
    value = _value(text)
    return f", got {_quoted(value)}" if value else ""


def _value(text: str) -> str:
    """Return the refused value; "" if it is a mapping, which would be too long to print."""
    value = re.search(r"(?:Given|Got) value: (.*?)(?:\. Got value: .*)?$", text, re.MULTILINE)
    nested = re.search(r"val='(.*)'\)", value[1]) if value else None
    written = nested[1] if nested else value[1] if value else ""
    return "" if written.startswith(("{", "Namespace(")) else _IN_YAML.get(written, written)


def _quoted(value: str) -> str:
    """Quote text; numbers, lists, true, false and null stay as they are written in YAML."""
    try:
        return repr(value) if isinstance(yaml.safe_load(value), str) else value
    except yaml.YAMLError:
        return repr(value)


# -- unknown and missing options -----------------------------------------------------------------------------------------


def _explain_missing(absent: list[str], key: str, words: Sequence[str], kind: str, class_path: str) -> str:
    options = f"{kind}{'s' * (len(absent) > 1)} {', '.join(map(repr, absent))}{f' of {class_path}' if class_path else ''}"
    recipe = "" if config_files(words) or "task" not in absent else ": pass a recipe, such as --config recipes/pretrain.yaml"
    return f"{where(key, words, class_path)}missing required {options}{recipe}"


def _explain_unknown(unknown: re.Match[str], keys: list[str], message: str, words: Sequence[str], options: list[str]) -> str:
    path = [*filter(None, [unknown["group"]]), *(unknown["word"] or unknown["option"]).split(".")]
    # An item of a list is shown after the option, with the classes within it.
    of_item = re.match(r" is not accepted\. Got value: Namespace\(class_path='([\w.]+)'", message.partition(unknown[0])[2])
    classes = [of_item[1]] if of_item else _CLASS.findall(message)
    if not classes:
        key = plain(".".join([*keys, *path]))
        return f"{where(key, words)}unknown option {key!r}{_of_a_class(key, options) or _nearest(key, options)}"
    path = [part for part in path if part != "init_args"]
    known = parameter_names(classes[-1])
    depth = 1
    if path[0] in known:  # a dataclass, and the unknown option is one of its fields
        known, depth = parameter_names(classes[-1], path[0]), 2
    key = plain(_complete([*keys, *path[:depth]], message, words))
    if not known:
        return f"{where(key, words)}unknown option {key!r}: {classes[-1]} has no options (is class_path missing?)"
    parent = key.rpartition(".")[0]
    near = _elsewhere_in_grpo(key, [*classes, *_CLASS.findall(message)])
    near = near or (_of_another_class(key, classes[-1]) if depth == 1 else "")
    return f"{where(key, words)}unknown option {key!r}{near or _nearest(key, [f'{parent}.{name}' for name in known])}"


def _of_a_class(key: str, options: list[str]) -> str:
    """Say which group has an option that was written without one: ``--lr`` is ``--optimizer.lr``."""
    if "." in key or "task" not in options:
        return ""
    from bumblebee.cli.shipped_classes import GROUPS, LISTS, having_option  # imports torch

    named = {f"{group}.{key}": having_option(group, key) for group in GROUPS if group not in ("callbacks", *LISTS)}
    full = [option for option in options if option.rpartition(".")[2] == key]
    full += [option for option, classes in named.items() if classes]
    if len(full) != 1:
        return ""
    classes = named.get(full[0], [])
    return did_you_mean(full) + (f", an option of {classes[0]}" if len(classes) == 1 else "")


def _elsewhere_in_grpo(key: str, classes: Sequence[str]) -> str:
    """What another library's option of GRPO corresponds to, if GRPO is among the classes."""
    name = key.removeprefix("task.")
    return f": {ELSEWHERE_IN_GRPO[name]}" if name in ELSEWHERE_IN_GRPO and "bumblebee.GRPO" in classes else ""


def _of_another_class(key: str, chosen: str) -> str:
    """Say which other shipped class of the group has an option that the chosen class does not have."""
    from bumblebee.cli.shipped_classes import EXAMPLES, group_of, having_option  # imports torch

    parent, _, name = key.rpartition(".")
    group = group_of(parent)
    classes = having_option(group, name) if group else []
    if not classes:
        return ""
    example = next((f"; see {EXAMPLES[path]}" for path in classes if path in EXAMPLES), "")
    return f": not an option of {chosen}, but of {_or(classes[:3])} (--{parent} CLASS){example}"


def _option_for(argument: str, options: set[str]) -> str:
    """Suggest the option that a stray argument is probably the value of."""
    for option, likely in (("model", Path(argument).is_dir()), ("config", argument.endswith((".yaml", ".yml")))):
        if likely and option in options:
            return f" (did you mean '--{option} {argument}'?)"
    return "; options are written --NAME VALUE, with quotes around a value that contains spaces"


def _nearest(key: str, known: list[str]) -> str:
    """Suggest the most similar siblings of a key, else list them all; of an unknown group, the groups."""
    if key in RENAMED:
        return f": it was renamed to {RENAMED[key]!r}"
    if key.rpartition(".")[2] in ELSEWHERE:
        return f": {ELSEWHERE[key.rpartition('.')[2]]}"
    parent, _, name = key.rpartition(".")
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == parent]
    if not siblings:
        parent, name, siblings = "", key.split(".")[0], list(dict.fromkeys(other.split(".")[0] for other in known))
    near = difflib.get_close_matches(name, siblings, n=2, cutoff=0.7)
    full = [f"{parent}.{other}" if parent else other for other in near]
    return did_you_mean(full) or f"; available options: {', '.join(name for name in siblings if name not in _NOT_LISTED)}"


def _complete(keys: list[str], text: str, words: Sequence[str]) -> str:
    """Return the whole key. jsonargparse omits a callback's name: find the callback that has the option or the class."""
    if keys[:1] != ["callbacks"]:
        return ".".join(keys)
    on_line = (
        re.match(r"--callbacks\.(\w+)(?:\.init_args)?(?:\.(\w+))?(?:=(.*))?$", f"{option}={value}")
        for option, value in option_values(words)
    )
    callbacks = [(match[1], {match[2], match[3]}) for match in on_line if match]
    callbacks += [callback for file in config_files(words) for callback in callbacks_in(file)]
    option = keys[1] if len(keys) > 1 else None
    names = [
        name for name, parts in callbacks if (option in parts if option else any(str(part) in text for part in parts if part))
    ]
    return ".".join(["callbacks", *names[:1], *keys[1:]])
