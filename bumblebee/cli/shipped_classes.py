"""Classes that a recipe may name: those that Bumblebee ships for each group, and ``--GROUP.help``.

``--callbacks.help`` lists the shipped callbacks, ``--callbacks.help callbacks.Checkpoint`` the options of a class.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from importlib import import_module

from jsonargparse import ArgumentParser

from bumblebee.callback import Callback
from bumblebee.cli.config_files import plain
from bumblebee.cli.errors.reporting import fail
from bumblebee.cli.signatures import locate_callable, parameter_names
from bumblebee.datamodule import DataModule
from bumblebee.optim import Optimizer, Schedule
from bumblebee.tasks.task import Task
from bumblebee.utils.formatting import hint

ClassOrFunction = Callable[..., object]

_BASES: dict[str, tuple[str, type]] = {  # group -> package, base class
    "task": ("bumblebee", Task),
    "data": ("datamodules", DataModule),
    "optimizer": ("torch.optim", Optimizer),
    "schedule": ("bumblebee.optim", Schedule),
    "callbacks": ("callbacks", Callback),
}
_MODELS = ("bumblebee.Bumblebee", "bumblebee.Bumblebee.from_pretrained", "bumblebee.HuggingFaceModel.from_pretrained")
LISTS = ("task.transforms", "task.rewards")  # groups of which a recipe names several
GROUPS = (*_BASES, "task.model", *LISTS)
EXAMPLES = {"bumblebee.Bumblebee.from_pretrained": "recipes/continue_pretrain.yaml"}  # recipes that use a class


def shipped(group: str) -> dict[str, ClassOrFunction]:
    """Return class path -> class of what can be named in a group; torch's own optimizers count as shipped."""
    if group == "task.model":
        return _located(*_MODELS)
    if group == "task.transforms":
        return {**_located("bumblebee.lora.LoRA"), **_classes_in("bumblebee.transforms", object)}
    if group == "task.rewards":
        return {path: made for path, made in _classes_in("bumblebee.rewards", object).items() if _is_reward(made)}
    package, base = _BASES[group]
    return _classes_in(package, base)


def group_of(key: str) -> str | None:
    """Return the group whose class a key names, such as "callbacks" for ``callbacks.bar``; None if there is none."""
    return next(
        (group for group in GROUPS if key == group or (group == "callbacks" and re.fullmatch(r"callbacks\.\w+", key))), None
    )


def named_like(group: str, name: str) -> list[str]:
    """Return the shipped classes of a group with this name, ignoring case and module; if there are none, a similar one."""
    if exact := _named(group, name):
        return exact
    names = [_bare(path) for path in shipped(group)]
    return [path for close in difflib.get_close_matches(_bare(name), names, n=1) for path in _named(group, close)]


def having_option(group: str, option: str) -> list[str]:
    """Return the shipped classes of a group that have an option."""
    return [path for path in shipped(group) if option in parameter_names(path)]


def complete_class_paths(words: Sequence[str]) -> list[str]:
    """Write the names of shipped classes on a command line as class paths: ``--optimizer AdamW`` is ``torch.optim.AdamW``.

    Upper and lower case are not distinguished. A name that fits no class, or several, is left for the parser to refuse.
    """
    completed: list[str] = []
    previous = ""
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("--") else (previous, "", word)
        path = _class_path_of(option, value) if option.startswith("--") else None
        completed.append(f"{option}={path}" if path and equals else path or word)
        previous = word
    return completed


def _class_path_of(option: str, name: str) -> str | None:
    group = group_of(plain(option[2:]).removesuffix(".class_path")) if re.fullmatch(r"[A-Za-z]\w*", name) else None
    paths = _named(group, name) if group else []
    return paths[0] if len(paths) == 1 else None


def _named(group: str, name: str) -> list[str]:
    """The shipped classes of a group with this name, ignoring case and module."""
    return [path for path in shipped(group) if _bare(path) == _bare(name)]


def _bare(name: str) -> str:
    return name.rpartition(".")[2].lower()


def print_help(group: str, path: str | None = None) -> None:
    """Print the shipped classes of a group, or the options of one class."""
    if path is None:
        _print_classes(group)
    else:
        _print_options(group, path)


def _key(group: str) -> str:
    return f"{group}.NAME" if group == "callbacks" else group


def _print_classes(group: str) -> None:
    classes = shipped(group)
    width = max(map(len, classes)) + 2
    print(f"Classes for --{_key(group)}:\n")
    for path, made in classes.items():
        print(f"  {path:<{width}}{(inspect.getdoc(made) or '').partition(chr(10))[0]}")
    print(f"\nYour own classes are named the same way. The options of a class: --{group}.help {next(iter(classes))}")


def _print_options(group: str, path: str) -> None:
    made = locate_callable(path)
    if made is None:
        fail(f"--{group}.help: cannot import a class named {path!r}{hint(path, shipped(group))}")
    key = _key(group)
    parser = ArgumentParser(prog="bumblebee fit", usage=f"bumblebee fit --{key} {path} ...", add_help=False)
    if inspect.isclass(made):
        parser.add_class_arguments(made, key, skip={"params"})  # an optimizer's parameters
    else:
        parser.add_function_arguments(made, key)
    parser.print_help()


def _located(*paths: str) -> dict[str, ClassOrFunction]:
    return {path: made for path in paths if (made := locate_callable(path)) is not None}


def _classes_in(package: str, base: type) -> dict[str, ClassOrFunction]:
    """The public subclasses of ``base`` that a package exports or a module defines."""
    module = import_module(package)
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == package]
    named = {f"{package}.{name}": getattr(module, name) for name in getattr(module, "__all__", own) if name[0] != "_"}
    return {path: made for path, made in named.items() if inspect.isclass(made) and _is_proper_subclass(made, base)}


def _is_proper_subclass(made: type, base: type) -> bool:
    return issubclass(made, base) and made.__name__ != base.__name__


def _is_reward(made: ClassOrFunction) -> bool:
    """Whether the objects of a class can be called, unlike errors and inputs of rewards."""
    return isinstance(made, type) and not inspect.isabstract(made) and any("__call__" in vars(base) for base in made.__mro__)
