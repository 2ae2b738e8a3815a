"""Checks of parsed options that jsonargparse does not make."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass

from jsonargparse import Namespace

from bumblebee.cli.config_files import callback_names, plain, where
from bumblebee.cli.errors.reporting import fail
from bumblebee.cli.signatures import locate_callable, parameter_types
from bumblebee.utils.formatting import hint


def check_flags(cfg: Namespace, flags: Sequence[str]) -> None:
    """Refuse an option without a value unless it is a boolean: a string would silently become "true"."""
    for flag in flags:
        value: object = cfg
        for name in flag.split("."):
            inner = value.get("init_args") if isinstance(value, Namespace) and name not in value else None
            parent = inner or value
            value = parent[name] if isinstance(parent, Namespace | dict) and name in parent else None
        if not isinstance(value, bool):
            fail(f"--{flag}: expected a value")


def check_groups(cfg: Namespace, words: Sequence[str]) -> None:
    """Refuse a group written as a plain value (``trainer: 3``) and an empty output folder."""
    for name in ("trainer", "task", "data", "optimizer"):
        if name in cfg and not isinstance(cfg[name], Namespace):
            fail(f"{where(name, words)}{name}: expected a mapping of options, got {cfg[name]!r}")
    if cfg.get("output_dir") == "":
        fail(f"{where('output_dir', words)}output_dir must not be empty")


def check_nulls(cfg: Namespace, actions: Sequence[argparse.Action], words: Sequence[str]) -> None:
    """Refuse null, which jsonargparse accepts for any option, where neither the type nor the default allows it."""
    types = {action.dest: getattr(action, "_typehint", action.type) for action in actions}
    nulls = [action.dest for action in actions if cfg.get(action.dest, 0) is None and action.default is not None]
    for key in [
        *(key for key in nulls if types[key] and "None" not in str(types[key])),
        *_invalid_nulls(cfg.as_dict(), "", None),
    ]:
        fail(f"{where(key, words)}{plain(key)} must not be null; set a value or leave the option out")


def _invalid_nulls(options: Mapping[str, object], key: str, made: Callable[..., object] | None) -> Iterator[str]:
    """Yield the keys of nulls that the class or function ``made`` does not accept, at any depth."""
    parameters = {} if made is None else inspect.signature(made).parameters
    for name, value in options.items():
        path = f"{key}.{name}".lstrip(".")
        if value is None:
            if name in parameters and "None" not in f"{parameters[name].annotation} {parameters[name].default}":
                yield path
        elif isinstance(value, dict) and "class_path" in value:
            yield from _invalid_nulls(value.get("init_args") or {}, path, locate_callable(str(value["class_path"])))
        elif isinstance(value, dict):
            kind = parameter_types(made).get(name) if name in parameters else None
            yield from _invalid_nulls(value, path, kind if isinstance(kind, type) and is_dataclass(kind) else None)


def check_callbacks(cfg: Namespace, words: Sequence[str]) -> None:
    """Refuse to remove a callback that no recipe defines: ``--callbacks.progres=null`` would silently do nothing."""
    known = callback_names(words)
    for name, callback in (cfg.get("callbacks") or {}).items():
        if callback is None and name not in known:
            fail(f"callbacks.{name}: cannot remove a callback that no recipe defines{hint(name, known)}")
