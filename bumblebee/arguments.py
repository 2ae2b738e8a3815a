"""The command line's parser: jsonargparse with recipes that compose, and with errors of one line.

An error names the option, where it was written (recipe and line) and the nearest valid names; the exit code is 2.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace


class UserError(SystemExit):
    """Ends the program with exit code 2; the line has been printed."""


def fail(message: str) -> NoReturn:
    """Print one line and end with exit code 2. Where there are several ranks, one of each machine prints."""
    from bumblebee import distributed

    if distributed.local_rank() == 0:
        print("bumblebee: " + " ".join(message.split()), file=sys.stderr)
    raise UserError(2)


class Recipe(ActionConfigFile):
    """``--config FILE``, several times. A later file's callbacks are added to the earlier's instead of replacing them all."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        before = cfg.get("callbacks") or {}
        super().__call__(parser, cfg, values, option_string)
        after = cfg.get("callbacks")
        if before and after is not None:
            cfg["callbacks"] = {**before, **after}


class Parser(ArgumentParser):
    """An ArgumentParser that explains itself in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Without this --trainer.max_step would silently mean --trainer.max_steps.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Called by jsonargparse for whatever it cannot accept."""
        if not self.exit_on_error:  # a parser inside the parser: the outer one will tell the whole path
            super().error(message, ex)
        fail(explain(message, sys.argv))


# -- what jsonargparse says, said in one line ----------------------------------------------------------------------------

_UNKNOWN = re.compile(
    r"Option '(?P<a>[^']+)' is not accepted|does not accept option '(?P<b>[^']+)'"
    r"|[Uu]nrecognized arguments?: (?:--)?(?P<c>\S+)|Key '(?P<d>[^']+)' is not expected|No action for key \"(?P<e>[^\"]+)\""
)


def explain(message: str, argv: list[str]) -> str:
    """The key, its place in a recipe, and what is wrong with it."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    unknown = _UNKNOWN.search(message)
    if unknown:
        name = next(group for group in unknown.groups() if group).split("=")[0]
        key = ".".join([*keys, name])
        near = difflib.get_close_matches(name.rpartition(".")[2], _known_names(message, key), n=2)
        hint = f" (did you mean {' or '.join(repr(n) for n in near)}?)" if near else ""
        return f"{where(key, argv)}unknown option {plain(key)!r}{hint}"
    reason = _reason(message)
    key = ".".join(keys)
    return f"{where(key, argv)}{plain(key) + ': ' if key else ''}{reason}"


def plain(key: str) -> str:
    """The key as a user writes it: without ``init_args``."""
    return re.sub(r"(^|\.)(init_args|dict_kwargs)(?=\.|$)", "", key).lstrip(".")


def _reason(message: str) -> str:
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    told = [line for line in lines if not line.startswith(("Parser key", "Does not validate", "Subtypes", "Error:"))]
    return told[-1] if told else " ".join(lines)


def _known_names(message: str, key: str) -> list[str]:
    """Names that would have been right: the parameters of the last class the message speaks of, or the recipe's groups."""
    import importlib
    import inspect

    for path in reversed(re.findall(r"[\w.]+\.[A-Za-z_]\w*", message)):
        module, _, name = path.rpartition(".")
        try:
            return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
        except (ImportError, AttributeError, TypeError, ValueError):
            continue
    if key.startswith("trainer."):
        from bumblebee.trainer import Trainer

        return list(inspect.signature(Trainer).parameters)
    return GROUPS


GROUPS = ["seed", "output_dir", "overwrite", "task", "data", "optimizer", "schedule", "trainer", "callbacks", "config"]


def where(key: str, argv: list[str]) -> str:
    """ "FILE:LINE: " of a key in the last recipe on the command line that has it, or nothing."""
    if any(word.split("=")[0] == f"--{plain(key)}" for word in argv):
        return ""  # it was written on the command line itself
    for file in reversed(recipes(argv)):
        try:
            node = yaml.compose(Path(file).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue
        line = _line_of(node, plain(key).split("."))
        if line is not None:
            return f"{file}:{line}: "
    return ""


def recipes(argv: list[str]) -> list[str]:
    """The files named by ``--config``."""
    following = [value for word, value in zip(argv, argv[1:], strict=False) if word == "--config"]
    return following + [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]


def _line_of(node: Any, path: list[str]) -> int | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    for key, value in node.value:
        if key.value in ("init_args", "dict_kwargs"):
            line = _line_of(value, path)
            if line is not None:
                return line
        elif key.value == path[0]:
            deeper = _line_of(value, path[1:]) if len(path) > 1 else None
            return deeper or key.start_mark.line + 1
    return None


# -- the words on the command line ---------------------------------------------------------------------------------------

_LISTS = ("--data.files", "--data.validation_files", "--files")


def fold(argv: list[str]) -> tuple[list[str], list[str]]:
    """Make what people write acceptable: ``--flag`` is true, ``--no_flag`` false, ``--data.files a b`` a list.

    Returns:
        The words for the parser, and the options that were written without a value: see ``check_flags``.
    """
    words: list[str] = []
    flags: list[str] = []
    index = 0
    while index < len(argv):
        word = argv[index]
        values = []
        while index + 1 < len(argv) and not argv[index + 1].startswith("--"):
            index += 1
            values.append(argv[index])
        index += 1
        if not word.startswith("--") or "=" in word:
            words += [word, *values]
        elif word in _LISTS and len(values) > 1:
            words.append(f"{word}={json.dumps(values)}")
        elif not values and word not in ("--help", "--print_config"):
            flags.append(word[2:].removeprefix("no_"))
            words.append(f"--{flags[-1]}={'false' if word.startswith('--no_') else 'true'}")
        else:
            words += [word, *values]
    return words, flags


def check_flags(cfg: Namespace, flags: list[str]) -> None:
    """Only a yes-or-no option may be written without a value: text would silently become "true"."""
    for flag in flags:
        value: Any = cfg
        for name in flag.split("."):
            inner = value.get("init_args") if isinstance(value, Namespace) and name not in value else None
            value = (inner or value)[name] if isinstance(value, Namespace | dict) and name in (inner or value) else None
        if not isinstance(value, bool):
            fail(f"--{flag}: expected a value after it")


def check_groups(cfg: Namespace) -> None:
    """A group written as a plain value (``trainer: 3``) passes the parser: refuse it here."""
    for name in ("trainer", "task", "data", "optimizer"):
        if name in cfg and not isinstance(cfg[name], Namespace):
            fail(f"{where(name, sys.argv)}{name}: expected options under it, got {cfg[name]!r}")
