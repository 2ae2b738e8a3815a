"""The fields of SamplingParams as options of a command: ``generate``, ``chat`` and ``serve`` take the same ones.

An option that nobody has given is not there: what it is then is told by the model folder's generation_config.json.

    add_sampling_options(parser)                        # --temperature 0.7 --stop "###" ...
    params = replace(generator.defaults, **given_sampling(parser.parse(words)))
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from bumblebee.cli.parser import Parser
from bumblebee.inference.sampling_params import SamplingParams


def add_sampling_options(parser: Parser, group: str = "", leave_out: Collection[str] = ()) -> None:
    """Give a parser an option for each field, with its help; the default of each is null, "not given".

    Args:
        parser: of the command.
        group: name before the options, such as "sampling" for ``--sampling.temperature``.
        leave_out: fields that the command does not take.
    """
    described = Parser()
    described.add_class_arguments(SamplingParams, None)
    helps = {action.dest: str(action.help) for action in described._actions}
    kinds = get_type_hints(SamplingParams)
    for field in fields(SamplingParams):
        if field.name not in leave_out:
            name, text = f"--{group}.{field.name}" if group else f"--{field.name}", (helps[field.name] or "").rstrip(".")
            otherwise = "" if field.default in (None, MISSING) else "; null: as the model folder says"
            parser.add_argument(name, type=kinds[field.name] | None, default=None, help=text + otherwise)


def given_sampling(cfg: Any, group: str = "") -> dict[str, Any]:
    """The fields that were given, in a recipe or on the command line.

    Raises:
        ValueError: a value out of its range.
    """
    options = cfg[group] if group else cfg
    given = {field.name: options[field.name] for field in fields(SamplingParams) if options.get(field.name) is not None}
    SamplingParams(**given)
    return given
