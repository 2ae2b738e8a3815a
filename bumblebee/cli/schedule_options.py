"""What becomes of a schedule's options when a later recipe or the command line chooses another class of schedule.

jsonargparse keeps every option of the former class whose name the new one has, too. Only the warm-up means the same in all
schedules: a Cosine's ``min_ratio`` is where the decay ends, ReduceOnPlateau's is a lower bound. The others are reset.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence

from bumblebee.cli.config_files import class_that_sets, option_values, plain
from bumblebee.cli.signatures import locate_callable, parameter_names

_CHOICES = ("--schedule", "--schedule.class_path")


def reset_former_options(words: Sequence[str]) -> list[str]:
    """Add words that reset the options which a config file sets for another class than the schedule that is chosen last."""
    path = _chosen_class(words)
    made = locate_callable(path) if path else None
    if path is None or made is None:
        return list(words)
    own = {plain(option[2:]) for option, _ in option_values(words)}
    resets = []
    for name, parameter in inspect.signature(made).parameters.items():
        former = class_that_sets("schedule", name, words)
        is_other = former is not None and former.rpartition(".")[2] != path.rpartition(".")[2]
        is_simple = parameter.default is None or isinstance(parameter.default, bool | int | float | str)
        if is_other and is_simple and f"schedule.{name}" not in own and name not in parameter_names("bumblebee.optim.Schedule"):
            resets.append(f"--schedule.{name}={json.dumps(parameter.default)}")
    end = _end_of_choice(words)
    return [*words[:end], *resets, *words[end:]]


def _chosen_class(words: Sequence[str]) -> str | None:
    on_line = [value for option, value in option_values(words) if option in _CHOICES]
    return on_line[-1] if on_line else class_that_sets("schedule", "class_path", words)


def _end_of_choice(words: Sequence[str]) -> int:
    """Index after the last word that chooses the class, on the command line or in a config file; config files come first."""
    choices = _CHOICES if any(word.partition("=")[0] in _CHOICES for word in words) else ("--config",)
    last = max((index for index, word in enumerate(words) if word.partition("=")[0] in choices), default=-1)
    return last + (1 if "=" in words[last] else 2) if last >= 0 else 0
