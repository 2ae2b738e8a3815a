"""What a sweep shows while it runs: a live table on a terminal, a line for each trial that ends elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import cast

import yaml

from bumblebee.sweep.parameter import Value
from bumblebee.sweep.runner import Running
from bumblebee.sweep.study import Study
from bumblebee.sweep.trials.trial import Trial, best_of
from bumblebee.utils.formatting import duration, format_metric

_REDRAW = 1.0  # seconds


def format_value(value: Value) -> str:
    """A parameter's value in four significant digits; text and integers as they are, and of options their names' last parts."""
    if isinstance(value, dict):
        return " ".join(f"{key.rpartition('.')[2]}={format_value(cast(Value, each))}" for key, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_values(values: Mapping[str, Value]) -> str:
    """All parameters of a trial."""
    return ", ".join(f"{key} {format_value(value)}" for key, value in values.items())


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are aligned; the first row has the names."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


class Display:
    """Shows the trials of a sweep.

    Args:
        study: of the sweep.
        count: number of trials; None for no limit.
        parallel: number of trials at the same time.
        is_terminal: whether to draw a live table; by default if stdout is a terminal.
    """

    def __init__(self, study: Study, count: int | None, parallel: int, is_terminal: bool | None = None) -> None:
        self.study, self.count, self.parallel = study, count, parallel
        self.is_terminal = sys.stdout.isatty() if is_terminal is None else is_terminal
        self._drawn = 0  # lines of the table on the screen
        self._next_draw = 0.0
        self._trials: list[Trial] = []
        self._lengths: dict[int, tuple[float, float]] = {}  # steps and epochs of each running trial

    def update(self, running: Sequence[Running]) -> None:
        """Redraw the table."""
        if self.is_terminal and time.monotonic() >= self._next_draw:
            self._next_draw = time.monotonic() + _REDRAW
            self._trials = self.study.trials()
            self._draw(self.lines(running))

    def started(self, running: Running, resumed: bool) -> None:
        """Print that a trial starts."""
        if not self.is_terminal:
            self._print(f"{running.trial.name} {'resumed' if resumed else 'started'}: {format_values(running.trial.values)}")

    def ended(self, trial: Trial, cut: str) -> None:
        """Print how a trial ended. On a terminal only failures: the table shows the others."""
        self._next_draw = 0.0
        metric = (
            "" if trial.metric is None else f", {self.study.file.metric} {format_metric(self.study.file.metric, trial.metric)}"
        )
        if cut:
            self._print(f"{trial.name} was cut off ({cut}){metric}: it goes on with --resume")
        elif trial.state == "failed":
            self._print(f"{trial.name} failed: {trial.message}")
        elif not self.is_terminal:
            self._print(
                f"{trial.name} {trial.state}{metric}, {duration(trial.seconds or 0)}. {self._summary(self.study.trials())}"
            )

    def lines(self, running: Sequence[Running]) -> list[str]:
        """The table: running trials and as many others as there is room for, and a summary."""
        columns, height = shutil.get_terminal_size()
        active = {each.trial.number: each for each in running}
        keys = [parameter.key for parameter in self.study.file.parameters]
        best = best_of(self._trials, self.study.file.goal)
        room = max(height - 4 - len(active), 1)
        ended = [trial for trial in self._trials if trial.number not in active]
        shown = {trial.number for trial in ended[-room:]} | set(active) | ({best.number} if best else set())
        rows = [["trial", *(key.removeprefix("task.").removeprefix("optimizer.") for key in keys), self.study.file.metric]]
        rows[0] += ["step", "state", "time", "left"]
        for trial in self._trials:
            if trial.number in shown:
                rows.append(self._row(trial, active.get(trial.number), keys, best))
        return [line[:columns] for line in [*text_table(rows), self._summary(self._trials)]]

    def _row(self, trial: Trial, running: Running | None, keys: Sequence[str], best: Trial | None) -> list[str]:
        values = [format_value(trial.values[key]) if key in trial.values else "" for key in keys]
        metric = "" if trial.metric is None else format_metric(self.study.file.metric, trial.metric)
        if running is None:
            ended = "cut off" if trial.state == "running" else "best" if best and best.number == trial.number else trial.state
            return [str(trial.number), *values, metric, "", ended, "" if trial.seconds is None else duration(trial.seconds), ""]
        seconds, left = time.monotonic() - running.began, self._left(running)
        state = "stopping" if running.pruned else trial.state
        return [
            str(trial.number), *values, metric, str(running.log.progress.step), state, duration(seconds),
            "" if left is None else duration(left),
        ]  # fmt: skip

    def _left(self, running: Running) -> float | None:
        """Seconds that a running trial still takes; None before its first line of metrics."""
        steps, epochs = self._length(running)
        progress = running.log.progress
        share = progress.step / steps if steps else progress.epoch / epochs if epochs else 0.0
        seconds = time.monotonic() - running.began
        return max(seconds / share - seconds, 0.0) if share > 0 else None

    def _length(self, running: Running) -> tuple[float, float]:
        number, recipe = running.trial.number, running.process.folder / "recipe.yaml"
        if number not in self._lengths and recipe.is_file():
            trainer = (yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}).get("trainer") or {}
            self._lengths[number] = trainer.get("max_steps") or 0.0, trainer.get("epochs") or 0.0
        return self._lengths.get(number, (0.0, 0.0))

    def _summary(self, trials: Sequence[Trial]) -> str:
        ended = [trial for trial in trials if trial.state != "running"]
        parts = [f"{len(ended)} of {self.count} trials" if self.count else f"{len(ended)} trials"]
        best = best_of(trials, self.study.file.goal)
        if best is not None and best.metric is not None:
            parts.append(
                f"best: {best.name} with {self.study.file.metric} {format_metric(self.study.file.metric, best.metric)}"
            )
        times = [trial.seconds for trial in ended if trial.seconds]
        if self.count and times and len(ended) < self.count:
            rounds = (self.count - len(ended)) / self.parallel
            parts.append(f"about {duration(sum(times) / len(times) * rounds)} left")
        return ", ".join(parts)

    def _draw(self, lines: Sequence[str]) -> None:
        up = f"\x1b[{self._drawn}A\r" if self._drawn else ""
        print(up + "\x1b[J" + "\n".join(lines), flush=True)
        self._drawn = len(lines)

    def _print(self, line: str) -> None:
        if self._drawn:  # replace the table, which is drawn again below
            print(f"\x1b[{self._drawn}A\r\x1b[J", end="")
            self._drawn = 0
        print(line, flush=True)
