"""The fields of SamplingParams as options of ``generate``, ``chat`` and ``serve``.

Their default is null, "not set": the model folder's generation_config.json then provides the value.

    add_sampling_options(parser)                        # --temperature 0.7 --stop "###" ...
    params = replace(generator.defaults, **explicit_sampling(parser.parse(words)))
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from jsonargparse import Namespace

from bumblebee.cli.parser import Parser
from bumblebee.inference.sampling.sampling_params import SamplingParams


def add_sampling_options(parser: Parser, group: str = "", leave_out: Collection[str] = ()) -> None:
    """Add an option for each field, with the field's help.

    Args:
        parser: of the command.
        group: prefix of the options, such as "sampling" for ``--sampling.temperature``.
        leave_out: fields that the command does not support.
    """
    described = Parser()
    described.add_class_arguments(SamplingParams, None)
    helps = {action.dest: str(action.help or "") for action in described._actions}
    types = get_type_hints(SamplingParams)
    for field in fields(SamplingParams):
        if field.name not in leave_out:
            name = f"--{group}.{field.name}" if group else f"--{field.name}"
            default = "" if field.default in (None, MISSING) else "; null: the model folder's value"
            help = helps[field.name].rstrip(".") + default
            parser.add_argument(name, type=types[field.name] | None, default=None, help=help)


def explicit_sampling(cfg: Namespace, group: str = "") -> dict[str, Any]:
    """Return the fields set in a config file or on the command line.

    Raises:
        ValueError: a value out of its range.
    """
    options = cfg[group] if group else cfg
    names = [field.name for field in fields(SamplingParams)]
    explicit = {name: options[name] for name in names if options.get(name) is not None}
    SamplingParams(**explicit)
    return explicit
