"""jsonargparse's parser with config files that compose and one-line errors.

An error names the option, the config file and line that set it, and the nearest valid names (``parse_errors``); the exit code
is 2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from bumblebee.cli import checks
from bumblebee.cli.argv import fold, list_options
from bumblebee.cli.commands import COMMANDS
from bumblebee.cli.config_files import class_in_file, option_values, plain, problem_of_file
from bumblebee.cli.errors.parse_errors import explain
from bumblebee.cli.errors.reporting import fail
from bumblebee.cli.schedule_options import reset_former_options

_TRANSFORMS = "task.init_args.transforms"


class ConfigFile(ActionConfigFile):
    """``--config FILE``: a recipe or a command's plain options; may be repeated.

    Later files override earlier ones; their callbacks and transforms are added to those of earlier files.
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        if problem := problem_of_file(str(values)):
            fail(problem)
        if (class_path := class_in_file(str(values))) and parser.has_recipe:
            from bumblebee.cli.shipped_classes import GROUPS, shipped  # imports torch

            group = next((group for group in GROUPS if class_path in shipped(group)), "task.model")
            fail(f"--config: {values} describes a {class_path}, not a recipe: use --{group} {values} together with a recipe")
        callbacks, transforms = cfg.get("callbacks") or {}, cfg.get(_TRANSFORMS) or []
        super().__call__(parser, cfg, values, option_string)
        if callbacks and (added := cfg.get("callbacks")) is not None:
            cfg["callbacks"] = {**callbacks, **added}
        if transforms and (added := cfg.get(_TRANSFORMS)) is not None:
            cfg[_TRANSFORMS] = merge_transforms(transforms, added)


def merge_transforms(earlier: Sequence[object], later: Sequence[object]) -> list[object]:
    """Return the transforms of two recipes: the later ones, then the earlier ones of other classes.

    The earlier ones come last so that ``--task.transforms.rank``, which addresses the last transform, still means the LoRA of
    the first recipe.
    """
    classes = [getattr(transform, "class_path", transform) for transform in later]
    return [*later, *(each for each in earlier if getattr(each, "class_path", each) not in classes)]


class Parser(ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # With abbreviations --trainer.max_step would silently set --trainer.max_steps.
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.words: list[str] = []  # the command line, folded
        self.flags: list[str] = []  # options written without a value

    def parse(self, words: Sequence[str]) -> Namespace:
        """Parse and check the words after the command; an error ends the program with one line."""
        self.words, self.flags = fold(words, list_options(self._actions))
        if "config" in self.flags:
            fail("--config: expected a value")
        self._print_class_help()
        self._complete_class_paths()
        if self.has_recipe:
            self.words = reset_former_options(self.words)
        cfg = self.parse_args(self.words)
        checks.check_groups(cfg, self.words)
        checks.check_nulls(cfg, self._actions, self.words)
        checks.check_flags(cfg, self.flags)
        checks.check_callbacks(cfg, self.words)
        return cfg

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Report what jsonargparse refuses. Overrides ArgumentParser.error."""
        if not self.exit_on_error:  # a nested parser: the outer one knows the whole key
            super().error(message, ex)
        refused = re.match(r'Parser key "([^"]+)"', message)
        if refused and plain(refused[1]) in self.flags:
            fail(f"--{plain(refused[1])}: expected a value")
        options = [action.dest for action in self._actions if not action.dest.endswith(".help")]
        arguments = [action.dest for action in self._actions if not action.option_strings]
        fail(explain(message, self.words, options, arguments))

    @property
    def has_recipe(self) -> bool:
        """Whether the command takes the groups of a recipe."""
        return any(action.dest == "task" for action in self._actions)

    def _complete_class_paths(self) -> None:
        """Let a recipe's groups name shipped classes without their module on the command line."""
        if self.has_recipe and any(value.isidentifier() for _, value in option_values(self.words)):
            from bumblebee.cli.shipped_classes import complete_class_paths  # imports torch

            self.words = complete_class_paths(self.words)

    def _print_class_help(self) -> None:
        """Handle ``--GROUP.help [CLASS]`` of a recipe's groups, and exit."""
        requests = [(option[2:-5], value) for option, value in option_values(self.words) if option.endswith(".help")]
        if not requests or not self.has_recipe:
            return
        from bumblebee.cli.shipped_classes import GROUPS, print_help  # imports torch

        for group, value in requests:
            if group in GROUPS:
                print_help(group, None if f"{group}.help" in self.flags else value)
                raise SystemExit(0)


def command_parser(command: str) -> Parser:
    """Return the parser of a command, without options."""
    return Parser(prog=f"bumblebee {command}", description=f"{COMMANDS[command]}.")
