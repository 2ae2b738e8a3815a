"""``bumblebee verify``: check that training is numerically correct on this machine, and benchmark it.

With ``--config RECIPE``, model and data are the recipe's, and so are precision, ZeRO stage, device and attention kernel unless
an option names them. Without it, ``--model FOLDER`` names the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from bumblebee.cli.config_files import option_values
from bumblebee.cli.errors.reporting import run_errors
from bumblebee.cli.errors.value_errors import user_errors
from bumblebee.cli.parser import Parser, command_parser
from bumblebee.cli.recipe_options import recipe_command_parser
from bumblebee.verify.verify_options import VerifyOptions

if TYPE_CHECKING:
    from bumblebee.verify.subject import Subject

_FROM_RECIPE = ("precision", "zero_stage", "device")  # options that are also the trainer's


def parser() -> Parser:
    """Return the options of the command."""
    options = command_parser("verify")
    config_help = "recipe whose model and data are checked; its other options may follow, as for fit"
    options.add_argument("--config", type=str | None, default=None, help=config_help)
    return _add_options(options)


def _add_options(options: Parser) -> Parser:
    model_help = "folder whose model is checked instead of the recipe's; its weights are not read"
    options.add_argument("--model", type=str | None, default=None, help=model_help)
    options.add_class_arguments(VerifyOptions, None)
    return options


def run(words: Sequence[str]) -> None:
    """Execute the command; the exit code is 1 if a check fails."""
    set_options = {option for option, _ in option_values(words)}
    has_recipe = "--config" in set_options
    options = _add_options(recipe_command_parser("verify")) if has_recipe else parser()
    cfg = options.parse(words)
    folder = cfg.model
    choices = {name: cfg[name] for name in VerifyOptions.__dataclass_fields__}
    if has_recipe:
        choices |= {name: cfg.trainer[name] for name in _FROM_RECIPE if f"--{name}" not in set_options}
    with user_errors(cfg, options.words):
        from bumblebee.verify.verification import Verification

        subject = _subject(cfg if has_recipe else None, folder)
        if "--attention" not in set_options:
            choices["attention"] = subject.attention
        verification = Verification(VerifyOptions(**choices), subject)
    with run_errors():
        passed = verification.run()
    raise SystemExit(not passed)


def _subject(recipe: Namespace | None, folder: str | None) -> Subject:
    """The model and data that the options name."""
    from contextlib import nullcontext
    from dataclasses import replace

    from bumblebee.models.load_context import shapes_only
    from bumblebee.recipe import build
    from bumblebee.verify.subject import Subject

    subject = Subject()
    if recipe is not None:
        with shapes_only():
            subject = Subject.of_run(build(recipe, nullcontext))
    if folder is not None:
        of_folder = Subject.of_folder(folder)
        return replace(subject, config=of_folder.config, model_class=of_folder.model_class)
    return subject
