"""The recipe of a sweep's trials: its words on the command line of ``fit``, and what a sweep asks of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import yaml

from bumblebee.sweep.parameter import OPTIONS, Value, word
from bumblebee.sweep.sweep_file import SweepFile
from bumblebee.sweep.trials.devices import Devices
from bumblebee.sweep.trials.trial import Trial

CONFIG = "config"  # the parameter whose values are recipes, which change whole groups
_HISTORY = "MetricsHistory"


@dataclass(frozen=True)
class SweepRecipe:
    """The resolved recipe that trials change.

    Args:
        text: as YAML.
        wandb: W&B project to which each trial is logged.
    """

    text: str
    wandb: str | None = None

    @property
    def content(self) -> dict[str, object]:
        """The recipe as a mapping."""
        content: dict[str, object] = yaml.safe_load(self.text)
        return content

    def leaves(self) -> dict[str, str]:
        """Each option but output_dir as ``--key``, with its value as text."""
        return {f"--{key}": str(value) for key, value in _leaves(self.content, "") if key != "output_dir"}

    def metrics_file(self) -> str:
        """Name of the metrics that trials write."""
        for callback in self._callbacks().values():
            if str(callback.get("class_path", "")).endswith(_HISTORY):
                return str(_mapping(callback.get("init_args")).get("file", "metrics.jsonl"))
        return "metrics.jsonl"

    def words(self, base: Path, values: Mapping[str, Value]) -> list[str]:
        """The options of ``fit`` for a trial.

        Args:
            base: file with the recipe.
            values: of the trial's parameters.
        """
        words = ["--config", str(base)]
        for key, value in values.items():
            if key == CONFIG:
                files = value if isinstance(value, list) else [] if value is None else [value]
                words += [each for file in files for each in ("--config", str(file))]
            elif key == OPTIONS and isinstance(value, dict):
                words += [word(option, cast(Value, each)) for option, each in value.items()]
            else:
                words.append(word(key, value))
        if not any(str(callback.get("class_path", "")).endswith(_HISTORY) for callback in self._callbacks().values()):
            words += ["--callbacks.metrics", "callbacks.MetricsHistory"]
        return words

    def command(self, base: Path, trial: Trial, folder: Path, devices: Devices) -> list[str]:
        """The command of a trial, under torchrun for several devices."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(len(devices))] * (len(devices) > 1)
        words = self.words(base, trial.values)
        if self.wandb is not None:
            words += ["--callbacks.wandb", "callbacks.WandB", f"--callbacks.wandb.project={self.wandb}"]
            words += [f"--callbacks.wandb.name={trial.name}"]
        words += ["--output_dir", str(folder), "--trainer.resume", "auto"]
        return [sys.executable, *launcher, "-m", "bumblebee", "fit", *words]

    def best(self, resolved: Mapping[str, object]) -> dict[str, object]:
        """The recipe of a trial as one of its own, which trains again into the sweep's output_dir."""
        trainer = {**_mapping(resolved["trainer"]), "resume": _mapping(self.content["trainer"]).get("resume")}
        dropped = {"wandb"} if self.wandb is not None and "wandb" not in self._callbacks() else set()
        callbacks = {name: value for name, value in _mapping(resolved.get("callbacks")).items() if name not in dropped}
        return {**resolved, "output_dir": self.content["output_dir"], "trainer": trainer, "callbacks": callbacks}

    def _callbacks(self) -> dict[str, dict[str, object]]:
        return {name: _mapping(callback) for name, callback in _mapping(self.content.get("callbacks")).items()}


def identity(file: SweepFile, recipe: SweepRecipe) -> dict[str, str]:
    """What makes a sweep the same sweep: the search space and the recipe, by key."""
    space = {f"parameters.{parameter.key}": repr(parameter) for parameter in file.parameters}
    pruner = " ".join([file.pruner, *(f"{key}={value}" for key, value in sorted(file.pruning.items()))])
    own = {"method": file.method, "metric": file.metric, "metric.goal": file.goal, "early_terminate": pruner}
    return {**own, **space, **recipe.leaves()}


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, path if name == "init_args" else f"{path}.{name}" if path else str(name))
    else:
        yield path, value


def class_paths(recipe: SweepRecipe) -> Sequence[str]:
    """Class paths of the recipe's callbacks."""
    return [str(callback.get("class_path", "")) for callback in recipe._callbacks().values()]
