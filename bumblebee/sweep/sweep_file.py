"""SweepFile: the search space of a sweep, in the vocabulary of W&B sweep files.

method: bayes                                     # or gp, random, grid, qmc
metric: {name: validation_loss, goal: minimize}
parameters:
  optimizer.lr: {distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-2}
  task: {parameters: {transforms.rank: {values: [8, 16, 64]}}}        # nested groups are joined by a point
early_terminate: {type: hyperband, min_iter: 2, eta: 3}
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn, cast

import yaml

from bumblebee.sweep.errors import SweepError
from bumblebee.sweep.parameter import MAX_GRID, Parameter, Value
from bumblebee.utils.formatting import hint

# Names of W&B, and the sampler's own.
METHODS = {"bayes": "tpe", "tpe": "tpe", "gp": "gp", "random": "random", "grid": "grid", "qmc": "qmc"}
PRUNERS: dict[str, tuple[str, ...]] = {
    "hyperband": ("min_iter", "max_iter", "eta", "s"),
    "asha": ("min_iter", "eta"),
    "median": ("min_iter", "min_trials"),
    "none": (),
}
_LADDER_KEYS = ("tokens_per_parameter", "sizes", "predict")
_KEYS = ("ladder", "name", "description", "method", "metric", "parameters", "early_terminate", "run_cap")
_ELSEWHERE = {
    "program": "the recipe is an option of the command: --config RECIPE",
    "command": "trials are started by the sweep; options of the recipe may follow those of the command",
    "project": "use the option --wandb PROJECT",
}
_SET_BY_SWEEP = ("output_dir", "trainer.resume")


@dataclass(frozen=True)
class LadderEntry:
    """A size ladder as it is written; ``ladder.rungs.resolve`` turns it into trials.

    Args:
        sizes: options that make the model of each size.
        tokens_per_parameter: one or several ratios of training tokens to parameters.
        predict: options of the sizes that are not trained.
    """

    sizes: list[dict[str, Value]]
    tokens_per_parameter: list[float]
    predict: list[dict[str, Value]]


@dataclass(frozen=True)
class SweepFile:
    """A sweep's file.

    Args:
        path: of the file.
        method: tpe, gp, random, grid or qmc.
        metric: a key of metrics.jsonl.
        goal: whether the metric is to be small or large.
        parameters: in the order of the file.
        pruner: hyperband, asha, median or none.
        pruning: options of the pruner.
        name: of the study in a storage that several sweeps share.
        run_cap: number of trials.
        lines: line of each key.
        ladder: sizes instead of parameters.
    """

    path: str
    method: str
    metric: str
    goal: Literal["minimize", "maximize"]
    parameters: list[Parameter]
    pruner: str = "none"
    pruning: Mapping[str, int] = field(default_factory=dict)
    name: str | None = None
    run_cap: int | None = None
    lines: Mapping[str, int] = field(default_factory=dict)
    ladder: LadderEntry | None = None

    @classmethod
    def read(cls, path: str) -> SweepFile:
        """Read and check a file.

        Raises:
            SweepError: it cannot be used; the message names file, line, key and value.
        """
        return _Reader(path).read()

    def at(self, key: str) -> str:
        """ "FILE:LINE: key" of a key or its closest parent, to begin a message with."""
        return f"{_place(self.path, self.lines, key)}{key}"

    def grid_size(self) -> int:
        """Number of points of the grid."""
        return math.prod(len(parameter.grid()) for parameter in self.parameters)


class _Reader:
    """Reads one file; every error names the line of its key."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.lines: dict[str, int] = {}

    def read(self) -> SweepFile:
        content = self._load()
        for name in content:
            if name not in _KEYS:
                known = f"{hint(name, _KEYS)}; available keys: {', '.join(_KEYS)}"
                reason = f": {_ELSEWHERE[name]}" if name in _ELSEWHERE else known
                self._fail(name, f"unknown key {name!r}{reason}", show_key=False)
        ladder = self._ladder(content) if "ladder" in content else None
        parameters = list(self._parameters(content.get("parameters"), "parameters", ""))
        if not parameters and ladder is None:
            self._fail("parameters", "the search space is empty: name at least one option and its values")
        self._check_keys(parameters)
        metric, goal = self._metric(content.get("metric"))
        pruner, pruning = self._early_terminate(content.get("early_terminate"))
        method = METHODS[self._one_of("method", content.get("method", "bayes"), METHODS)]
        if method == "grid":
            self._check_grid(parameters)
        own_name = content.get("name")
        return SweepFile(
            self.path, method, metric, goal, parameters, pruner, pruning, None if own_name is None else str(own_name),
            self._at_least_1("run_cap", content["run_cap"]) if "run_cap" in content else None, self.lines, ladder,
        )  # fmt: skip

    def _load(self) -> dict[str, object]:
        if not Path(self.path).is_file():
            folder = Path(self.path).parent
            near = [str(other) for other in folder.glob("*.y*ml")] if folder.is_dir() else []
            raise SweepError(f"--sweep: file not found: {self.path}{hint(self.path, near)}")
        try:
            text = Path(self.path).read_text(encoding="utf-8")
            node, content = yaml.compose(text), yaml.safe_load(text)
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
            raise SweepError(f"{self.path}{line}: invalid YAML: {error.problem}") from error
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise SweepError(f"{self.path}: cannot read file: {error}") from error
        if not isinstance(content, dict):
            raise SweepError(f"{self.path}: expected 'method:', 'metric:' and 'parameters:' with a search space")
        for path, number in _key_lines(node, ""):
            if path in self.lines:
                raise SweepError(f"{self.path}:{number}: duplicate key {path!r}")
            self.lines[path] = number
        return {str(name): value for name, value in content.items()}

    def _ladder(self, content: Mapping[str, object]) -> LadderEntry:
        for name in ("parameters", "method", "early_terminate", "run_cap"):
            if name in content:
                self._fail(name, "has no meaning beside ladder, which trains each of its sizes once")
        entry = content["ladder"]
        if not isinstance(entry, dict):
            self._fail("ladder", f"expected {', '.join(_LADDER_KEYS)}, got {entry!r}")
        for name in entry:
            if name not in _LADDER_KEYS:
                available = f"{hint(name, _LADDER_KEYS)}; available keys: {', '.join(_LADDER_KEYS)}"
                self._fail(f"ladder.{name}", f"unknown key {name!r}{available}")
        ratio = entry.get("tokens_per_parameter", 20)
        ratios = ratio if isinstance(ratio, list) else [ratio]
        if not ratios or not all(isinstance(each, int | float) and each > 0 for each in ratios):
            self._fail("ladder.tokens_per_parameter", f"expected a number greater than 0, or several, got {ratio!r}")
        sizes, predict = (self._sizes(f"ladder.{name}", entry.get(name, [])) for name in ("sizes", "predict"))
        if len(sizes) < 3 or (len(ratios) > 1 and len(sizes) * len(ratios) < 6):
            self._fail("ladder.sizes", f"expected at least three sizes, got {len(sizes)}")
        return LadderEntry(sizes, [float(each) for each in ratios], predict)

    def _sizes(self, key: str, entries: object) -> list[dict[str, Value]]:
        if not isinstance(entries, list) or not all(isinstance(entry, dict) and entry for entry in entries):
            self._fail(key, f"expected a list of options, such as [{{task.model.config.hidden_size: 64}}], got {entries!r}")
        return entries

    def _parameters(self, entries: object, place: str, prefix: str) -> Iterator[Parameter]:
        if entries is None:
            return
        if not isinstance(entries, dict):
            self._fail(place, f"expected a mapping from options to their values, got {entries!r}")
        for name, entry in cast(dict[str, object], entries).items():
            here, key = f"{place}.{name}", f"{prefix}{name}"
            if isinstance(entry, dict) and "parameters" in entry:
                yield from self._parameters(entry["parameters"], f"{here}.parameters", f"{key}.")
                continue
            try:
                yield Parameter.read(key, entry)
            except ValueError as error:
                self._fail(here, str(error))

    def _check_keys(self, parameters: list[Parameter]) -> None:
        keys = [parameter.key for parameter in parameters]
        for key in keys:
            if keys.count(key) > 1:
                self._fail("parameters", f"{key} is there twice")
            if key in _SET_BY_SWEEP:
                self._fail(f"parameters.{key}", "is set by the sweep for each trial")

    def _check_grid(self, parameters: list[Parameter]) -> None:
        for parameter in parameters:
            try:
                parameter.grid()
            except ValueError as error:
                self._fail(f"parameters.{parameter.key}", str(error))
        size = math.prod(len(parameter.grid()) for parameter in parameters)
        if size > MAX_GRID:
            self._fail("parameters", f"a grid of {size:,} points; at most {MAX_GRID:,} are possible")

    def _metric(self, entry: object) -> tuple[str, Literal["minimize", "maximize"]]:
        if not isinstance(entry, dict) or not entry.get("name"):
            self._fail("metric", "expected the metric's name, such as {name: validation_loss, goal: minimize}")
        entry = cast(dict[str, object], entry)
        for name in entry:
            if name not in ("name", "goal"):
                self._fail(f"metric.{name}", f"unknown key {name!r}; available keys: name, goal")
        goal = self._one_of("metric.goal", entry.get("goal", "minimize"), ("minimize", "maximize"))
        return str(entry["name"]), "minimize" if goal == "minimize" else "maximize"

    def _early_terminate(self, entry: object) -> tuple[str, dict[str, int]]:
        if entry is None:
            return "none", {}
        if not isinstance(entry, dict):
            self._fail("early_terminate", f"expected a type, such as {{type: hyperband, min_iter: 2}}, got {entry!r}")
        entry = dict(cast(dict[str, object], entry))
        kind = self._one_of("early_terminate.type", entry.pop("type", None) or "none", PRUNERS)
        for name in entry:
            if name not in PRUNERS[kind]:
                self._fail(
                    f"early_terminate.{name}", f"unknown key {name!r}; {kind} has: {', '.join(PRUNERS[kind]) or 'no options'}"
                )
        options = {name: self._at_least_1(f"early_terminate.{name}", value) for name, value in entry.items()}
        if options.get("eta", 2) < 2:
            self._fail("early_terminate.eta", "must be at least 2, got 1")
        if "s" in options and "max_iter" not in options:
            self._fail("early_terminate.s", "needs max_iter: the first bracket is at max_iter / eta**s")
        return kind, options

    def _one_of(self, key: str, value: object, known: Mapping[str, object] | tuple[str, ...]) -> str:
        if value not in known:
            self._fail(
                key, f"unknown {key.rpartition('.')[2]} {value!r}{hint(str(value), known)}; available: {', '.join(known)}"
            )
        return str(value)

    def _at_least_1(self, key: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self._fail(key, f"expected an integer of at least 1, got {value!r}")
        return value

    def _fail(self, key: str, reason: str, show_key: bool = True) -> NoReturn:
        raise SweepError(f"{_place(self.path, self.lines, key)}{f'{key}: ' if show_key else ''}{reason}")


def _place(path: str, lines: Mapping[str, int], key: str) -> str:
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return f"{path}:{lines[key]}: " if key else f"{path}: "


def _key_lines(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{prefix}{key.value}"
            yield path, key.start_mark.line + 1
            yield from _key_lines(value, f"{path}.")
