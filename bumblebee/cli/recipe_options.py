"""The groups of a recipe as options of a command: ``fit``, ``validate``, ``preview`` and ``evaluate`` share them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from jsonargparse import Namespace

from bumblebee.cli.parser import ConfigFile, Parser, command_parser
from bumblebee.recipe import add_recipe_arguments

Sample = TypeVar("Sample")


def recipe_command_parser(command: str) -> Parser:
    """Return the parser of a command that takes a recipe."""
    parser = command_parser(command)
    parser.add_argument("--config", action=ConfigFile, help="recipe; if repeated, later files override earlier ones")
    add_recipe_arguments(parser)
    return parser


def use_tokenizer_of(cfg: Namespace, folder: str) -> None:
    """Let a recipe's data read the tokenizer of a trained model: the recipe's own may no longer exist, or be another model's.

    Raises:
        ValueError: there is no model folder.
    """
    from bumblebee.checkpoint.adapters.folder import base_model_folder
    from bumblebee.checkpoint.hf_folder import is_supported_folder

    is_supported_folder(base_model_folder(folder))
    if "tokenizer" in cfg.data.get("init_args", {}):
        cfg.data.init_args.tokenizer = folder


def require_validation(samples: Sequence[Sample] | None) -> Sequence[Sample]:
    """Return the validation samples of a recipe's data.

    Raises:
        ValueError: there are none.
    """
    if not samples:
        raise ValueError("the recipe's data has no validation samples: set data.validation_ratio or data.validation_files")
    return samples
