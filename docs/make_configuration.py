"""Writes configuration.md: every command's options and those of every shipped class, asked of the parser itself.

Run by ``make docs``, or with any path as an argument. ``tests/test_configuration.py`` tells when the page is out of date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import callbacks
import datamodules
from bumblebee import DPO, Bumblebee, HuggingFaceModel, LanguageModeling, optim, transforms
from bumblebee.cli import main as cli
from bumblebee.cli.parser import Parser
from bumblebee.lora import LoRA

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Options

Written by `make docs` from the parser: do not edit. An option is a line of a recipe and a flag, `--trainer.epochs 2`. A flag
wins over a recipe, a recipe over the default, a later `--config` over an earlier one; their callbacks and transforms add up.
Of a yes-or-no option `--option` is true and `--no_option` false. `null` is nothing. `--print_config` shows the result.

A class is chosen by its path, `--schedule bumblebee.optim.Linear`; its options follow the name of the group:
`--schedule.min_ratio 0.1`, `--callbacks.checkpoint.every 100`. `--task.transforms.rank 8` speaks of the last transform in the
list. The optimizer is any class of torch's kind, such as `torch.optim.AdamW` with `lr`, `betas`, `eps` and `weight_decay`.
"""


class _Caught(Exception):
    """The parser of a command, at the moment at which it would parse."""

    def __init__(self, parser: Parser) -> None:
        self.parser = parser


def parser_of(command: str) -> Parser:
    """What ``bumblebee COMMAND`` parses with."""

    def caught(parser: Parser, words: list[str]) -> None:
        raise _Caught(parser)

    with patch.object(Parser, "parse", caught):
        try:
            getattr(cli, command)([])
        except _Caught as found:
            return found.parser
    raise AssertionError(f"{command} has no parser")


def options(parser: Any) -> list[Any]:
    """The parser's actions that are options: no help, nothing that only holds others."""
    hidden = ("help", "print_config", "trainer")
    return [
        action
        for action in parser._actions
        if action.dest not in hidden and not action.dest.endswith(".help") and "configuration file" not in action.help
    ]


def required(parser: Any, action: Any) -> bool:
    """Whether it has to be given."""
    return bool(action.required) or action.dest in parser._extra_required_keys


def in_words(kind: Any) -> str:
    """A type as a user would say it: ``int or null``."""
    text = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
    text = re.sub(r"\b(typing|pathlib|collections\.abc|[a-z_]+(\.[a-z_]+)*)\.(?=[A-Za-z])", "", text).replace(
        "NoneType", "None"
    )
    while match := re.search(r"(Union|Optional)\[", text):
        inner, end = _inside(text, match.end())
        parts = [*_split(inner), *(["None"] if match[1] == "Optional" else [])]
        text = text[: match.start()] + " | ".join(parts) + text[end:]
    text = re.sub(r"Literal\[(.*?)\]", lambda m: m[1].replace("'", "").replace(", ", " | "), text)
    return text.replace("None", "null").replace(" | ", " or ")


def _inside(text: str, begin: int) -> tuple[str, int]:
    """What stands between a bracket that has been opened and its end, and the place behind that."""
    depth, end = 1, begin
    while depth:
        depth += {"[": 1, "]": -1}.get(text[end], 0)
        end += 1
    return text[begin : end - 1], end


def _split(text: str) -> list[str]:
    """At the commas that stand in no bracket."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text)]


def value(default: Any) -> str:
    """A default as it is written in a recipe."""
    plain = {None: "null", True: "true", False: "false"}
    return plain[default] if default is None or isinstance(default, bool) else str(default)


def table(parser: Any, actions: Iterable[Any], prefix: str = "") -> Iterator[str]:
    """The lines of a table of options."""
    yield from ("", "| option | default | type | |", "|---|---|---|---|")
    for action in actions:
        needed = required(parser, action)
        default = "required" if needed else f"`{value(action.default)}`"
        kind = in_words(getattr(action, "_typehint", action.type) or str).removesuffix(" or null" if needed else "nothing")
        told = " ".join(action.help.split()).replace("|", "\\|").replace("``", "`").replace("None", "null").rstrip(".")
        yield f"| `{prefix}{action.dest}` | {default} | {kind} | {told} |"


def part(title: str, made: Callable[..., Any], name: str | None = None) -> Iterator[str]:
    """What a class takes, or its method ``name``."""
    parser = Parser()
    owner: Any = made
    parser.add_method_arguments(owner, name, None) if name else parser.add_class_arguments(owner, None)
    doc = (getattr(owner, name) if name else owner).__doc__
    yield from ("", f"### `{title}`", "", " ".join(doc.split("\n\n")[0].split()).replace("``", "`"))
    if found := options(parser):
        yield from table(parser, found)


def commands() -> Iterator[str]:
    """Each command; the options of a recipe once for all commands that take one."""
    recipe = cli.recipe_parser("fit", "")
    shared = [action.dest for action in options(recipe)]
    yield from ("", "## A recipe", "", "`task`, `data`, `optimizer`, `schedule` and each of `callbacks` is a class, see below.")
    yield from table(recipe, options(recipe))
    for command, what in cli.COMMANDS.items():
        found = options(parser := parser_of(command))
        takes_recipe = any(action.dest == "task" for action in found)
        own = [action for action in found if not (takes_recipe and action.dest in shared)]
        also = " Takes a recipe's options, too." if takes_recipe else ""
        yield from ("", f"## `bumblebee {command}`", "", f"{what[0].upper()}{what[1:]}.{also}")
        yield from table(parser, own) if own else ()


def of_module(module: Any, base: type = object) -> list[type]:
    """The classes that are written in a module and are made of ``base``."""
    here = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    return [each for each in here if issubclass(each, base) and each is not base]


def classes() -> Iterator[str]:
    """Each class that a recipe may name."""
    yield from ("", "## `task`")
    for task in (LanguageModeling, DPO):
        yield from part(f"bumblebee.{task.__name__}", task)
    yield from ("", "## `task.model`")
    yield from part("bumblebee.Bumblebee", Bumblebee)
    yield from part("bumblebee.Bumblebee.from_pretrained", Bumblebee, "from_pretrained")
    yield from part("bumblebee.HuggingFaceModel.from_pretrained", HuggingFaceModel, "from_pretrained")
    yield from ("", "## `task.transforms`: a list of these")
    for transform in (LoRA, *of_module(transforms)):
        yield from part(f"{transform.__module__}.{transform.__name__}", transform)
    yield from ("", "## `data`")
    for name in sorted(name for name in datamodules.__all__):
        yield from part(f"datamodules.{name}", getattr(datamodules, name))
    yield from ("", "## `schedule`")
    for schedule in of_module(optim, optim.Schedule):
        yield from part(f"bumblebee.optim.{schedule.__name__}", schedule)
    yield from ("", "## `trainer.groups`: a list of these")
    yield from part("bumblebee.optim.GroupRule", optim.GroupRule)
    yield from ("", "## `callbacks`: by names of your own")
    for name in callbacks.__all__:
        yield from part(f"callbacks.{name}", getattr(callbacks, name))


def page() -> str:
    """The whole page."""
    return HEAD + "\n".join([*commands(), *classes()]) + "\n"


if __name__ == "__main__":
    (Path(sys.argv[1]) if sys.argv[1:] else PAGE).write_text(page(), encoding="utf-8")
