"""The command line's parser: jsonargparse with recipes that compose, and with errors of one line.

An error names the option, where it was written (recipe and line) and the nearest valid names; the exit code is 2. How it is
said: ``explanations.py``.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pydoc import locate
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from bumblebee.cli.config_files import names_of_callbacks, plain, problem_of_recipe, where
from bumblebee.cli.errors import explain, hints_of
from bumblebee.formatting import hint


class UserError(SystemExit):
    """Ends the program with exit code 2; the line has been printed."""


def fail(message: str) -> NoReturn:
    """Print one line and end with exit code 2. Where there are several ranks, one of each machine prints."""
    from bumblebee.distributed import process_group

    if process_group.local_rank() == 0:
        print("bumblebee: " + " ".join(message.split()), file=sys.stderr)
    raise UserError(2)


class Recipe(ActionConfigFile):
    """``--config FILE``, several times, of a recipe or of a command's plain options.

    A later file's callbacks and transforms are added to the earlier's.
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        if problem := problem_of_recipe(str(values)):
            fail(problem)
        callbacks, transforms = cfg.get("callbacks") or {}, cfg.get(_TRANSFORMS) or []
        super().__call__(parser, cfg, values, option_string)
        after = cfg.get("callbacks")
        if callbacks and after is not None:
            cfg["callbacks"] = {**callbacks, **after}
        if transforms and (added := cfg.get(_TRANSFORMS)) is not None:
            cfg[_TRANSFORMS] = composed(transforms, added)


_TRANSFORMS = "task.init_args.transforms"


def composed(earlier: list[Any], later: list[Any]) -> list[Any]:
    """Transforms of two recipes: the later one's, and behind them those of the earlier one that are of another class.

    Behind, so that ``--task.transforms.rank``, which speaks of the last one, still means the LoRA of the first recipe.
    """
    kinds = [getattr(transform, "class_path", transform) for transform in later]
    return [*later, *(one for one in earlier if getattr(one, "class_path", one) not in kinds)]


class Parser(ArgumentParser):
    """An ArgumentParser that explains itself in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Without this --trainer.max_step would silently mean --trainer.max_steps.
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.words: list[str] = []  # of the command line, folded
        self.flags: list[str] = []  # options that were written without a value

    def parse(self, words: list[str]) -> Namespace:
        """Words -> the checked options. Whatever is wrong ends the program with one line."""
        self.words, self.flags = fold(words)
        if "config" in self.flags:
            fail("--config: expected a value after it")
        cfg = self.parse_args(self.words)
        check_groups(cfg, self.words)
        check_nulls(cfg, self._actions, self.words)
        check_flags(cfg, self.flags)
        check_callbacks(cfg, self.words)
        return cfg

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Called by jsonargparse for whatever it cannot accept."""
        if not self.exit_on_error:  # a parser inside the parser: the outer one will tell the whole path
            super().error(message, ex)
        wrong = re.match(r'Parser key "([^"]+)"', message)
        if wrong and plain(wrong[1]) in self.flags:
            fail(f"--{plain(wrong[1])}: expected a value after it")
        options = [action.dest for action in self._actions if not action.dest.endswith(".help")]
        fail(explain(message, self.words, options))


# -- the words on the command line ---------------------------------------------------------------------------------------

_LISTS = ("--data.files", "--data.validation_files", "--files", "--metrics", "--device")
_ALWAYS_LISTS = ("stop", "stop_ids", "spelled_ids")  # also where one value is given, and in any group


def fold(argv: list[str]) -> tuple[list[str], list[str]]:
    """Make what people write acceptable: ``--flag`` is true, ``--no_flag`` false, ``--data.files a b`` a list.

    Recipes come first, wherever they were written: an option on the command line wins over all of them.

    Returns:
        The words for the parser, and the options that were written without a value: see ``check_flags``.
    """
    words: list[str] = []
    recipes: list[str] = []
    flags: list[str] = []
    index = 0
    while index < len(argv):
        word = argv[index]
        values = []
        while index + 1 < len(argv) and not argv[index + 1].startswith("--"):
            index += 1
            values.append(argv[index])
        index += 1
        if _is_list(word) and "=" in word and not word.partition("=")[2].startswith("["):
            word, _, value = word.partition("=")
            values.insert(0, value)
        if word.split("=")[0] == "--config" and (values or "=" in word):
            recipes += [word] if "=" in word else [part for value in values for part in (word, value)]
        elif not word.startswith("--") or "=" in word:
            words += [word, *values]
        elif values and _is_list(word):
            words.append(f"{word}={json.dumps(values)}")
        elif word in _LISTS and len(values) > 1:
            words.append(f"{word}={json.dumps([_item(value) for value in values])}")
        elif not values and word not in ("--help", "--print_config"):
            flags.append(word[2:].removeprefix("no_"))
            words.append(f"--{flags[-1]}={'false' if word.startswith('--no_') else 'true'}")
        else:
            words += [word, *values]
    return recipes + words, flags


def _is_list(word: str) -> bool:
    return word.startswith("--") and word[2:].partition("=")[0].rpartition(".")[2] in _ALWAYS_LISTS


def _item(word: str) -> Any:
    """A word of a list: text, or an entry with options, ``{path: a.jsonl, weight: 2}``."""
    if not word.startswith("{"):
        return word
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def check_flags(cfg: Namespace, flags: list[str]) -> None:
    """Only a yes-or-no option may be written without a value: text would silently become "true"."""
    for flag in flags:
        value: Any = cfg
        for name in flag.split("."):
            inner = value.get("init_args") if isinstance(value, Namespace) and name not in value else None
            value = (inner or value)[name] if isinstance(value, Namespace | dict) and name in (inner or value) else None
        if not isinstance(value, bool):
            fail(f"--{flag}: expected a value after it")


def check_groups(cfg: Namespace, words: list[str]) -> None:
    """A group written as a plain value (``trainer: 3``) and an empty folder pass the parser: refuse them here."""
    for name in ("trainer", "task", "data", "optimizer"):
        if name in cfg and not isinstance(cfg[name], Namespace):
            fail(f"{where(name, words)}{name}: expected options under it, got {cfg[name]!r}")
    if cfg.get("output_dir") == "":
        fail(f"{where('output_dir', words)}output_dir is empty: expected a folder")


def check_nulls(cfg: Namespace, actions: list[Any], words: list[str]) -> None:
    """jsonargparse takes null for any option: refuse it where neither the type nor the default says that it may be null."""
    kinds = {action.dest: getattr(action, "_typehint", action.type) for action in actions}
    nulls = [action.dest for action in actions if cfg.get(action.dest, 0) is None and action.default is not None]
    for key in [
        *(key for key in nulls if kinds[key] and "None" not in str(kinds[key])),
        *_wrong_nulls(cfg.as_dict(), "", None),
    ]:
        fail(f"{where(key, words)}{plain(key)} is null: give it a value, or leave it out")


def _wrong_nulls(options: dict[str, Any], key: str, made: Any) -> Iterator[str]:
    """The keys of nulls that ``made``, a class or function, does not expect, and of those further down."""
    takes = {} if made is None else inspect.signature(made).parameters
    for name, value in options.items():
        path = f"{key}.{name}".lstrip(".")
        if value is None and name in takes and "None" not in f"{takes[name].annotation} {takes[name].default}":
            yield path
        elif isinstance(value, dict) and "class_path" in value:
            yield from _wrong_nulls(value.get("init_args") or {}, path, locate(str(value["class_path"])))
        elif isinstance(value, dict):
            kind = hints_of(made).get(name) if name in takes else None
            yield from _wrong_nulls(value, path, kind if is_dataclass(kind) else None)


def check_callbacks(cfg: Namespace, words: list[str]) -> None:
    """``--callbacks.progres=null`` would remove nothing, in silence."""
    known = names_of_callbacks(words)
    for name, callback in (cfg.get("callbacks") or {}).items():
        if callback is None and name not in known:
            fail(f"callbacks.{name}: no recipe has such a callback to remove{hint(name, known)}")
