"""The results of a sweep in its folder: trials.csv, trials.md, best.yaml and plots.

The tables and best.yaml are written after every trial, the plots at the end of the sweep.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import yaml

from bumblebee.plotting.sweep_plots import SweepData, TrialCurve, plot_sweep
from bumblebee.sweep.display import format_value
from bumblebee.sweep.parameter import Value
from bumblebee.sweep.recipe import SweepRecipe
from bumblebee.sweep.study import IMPORTANCE, Study
from bumblebee.sweep.trials.file_lock import FileLock
from bumblebee.sweep.trials.trial import Trial, best_of
from bumblebee.sweep.trials.trial_log import TrialLog
from bumblebee.utils.formatting import duration, format_metric
from bumblebee.utils.text_files import write_text


class SweepReport:
    """Writes the results of a sweep.

    Args:
        study: of the sweep.
        folder: to write to; it has the folders of the trials.
        recipe: that trials change.
    """

    def __init__(self, study: Study, folder: Path, recipe: SweepRecipe) -> None:
        self.study, self.folder, self.recipe = study, folder, recipe

    def write_tables(self) -> None:
        """Write trials.csv and trials.md, and best.yaml if a trial is complete."""
        with self._alone():
            trials = self.study.trials()
            write_text(self.folder / "trials.csv", self._csv(trials))
            write_text(self.folder / "trials.md", self._markdown(trials))
            self._write_best(trials)

    def write_plots(self) -> list[Path]:
        """Draw the plots for which there are enough trials; returns their files."""
        trials = [trial for trial in self.study.trials() if trial.metric is not None]
        data = SweepData(
            metric=self.study.file.metric,
            goal=self.study.file.goal,
            parameters={parameter.key: parameter.log for parameter in self.study.file.parameters},
            numbers=[trial.number for trial in trials],
            values=[{key: _drawn(value) for key, value in trial.values.items()} for trial in trials],
            results=[trial.metric or 0.0 for trial in trials],
            complete=[trial.state == "complete" for trial in trials],
            curves=[self._curve(trial) for trial in trials],
        )
        with self._alone():
            return plot_sweep(data, self.study.importance(), IMPORTANCE, self.folder)

    def _alone(self) -> FileLock:
        """Workers that share a sweep write one after the other."""
        lock = FileLock.acquire(self.folder / ".report", wait=True)
        assert lock is not None
        return lock

    def _curve(self, trial: Trial) -> TrialCurve:
        log = TrialLog(self.folder / trial.name / self.recipe.metrics_file(), self.study.file.metric)
        log.read()
        return TrialCurve(log.steps, log.values)

    def _csv(self, trials: list[Trial]) -> str:
        keys = [parameter.key for parameter in self.study.file.parameters]
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["trial", "state", self.study.file.metric, *keys, "seconds", "host", "message"])
        for trial in trials:
            values = [trial.values.get(key, "") for key in keys]
            metric = "" if trial.metric is None else repr(trial.metric)
            seconds = "" if trial.seconds is None else f"{trial.seconds:.1f}"
            table.writerow([trial.number, trial.state, metric, *values, seconds, trial.host, trial.message])
        return text.getvalue()

    def _markdown(self, trials: list[Trial]) -> str:
        """The trials, the best ones first."""
        metric, sign = self.study.file.metric, 1 if self.study.file.goal == "minimize" else -1
        keys = [parameter.key for parameter in self.study.file.parameters]
        order = {"complete": 0, "pruned": 1, "running": 2, "failed": 3}
        ranked = sorted(trials, key=lambda trial: (order[trial.state], sign * (trial.metric or 0.0), trial.number))
        lines = ["| " + " | ".join(["trial", *keys, metric, "state", "time"]) + " |"]
        lines.append("|" + "---|" * (len(keys) + 4))
        for trial in ranked:
            values = [format_value(trial.values[key]) if key in trial.values else "" for key in keys]
            result = "" if trial.metric is None else format_metric(metric, trial.metric)
            state = f"{trial.state}: {trial.message}" if trial.message else trial.state
            cells = [str(trial.number), *values, result, state, "" if trial.seconds is None else duration(trial.seconds)]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return "\n".join(lines) + "\n"

    def _write_best(self, trials: list[Trial]) -> None:
        best = best_of(trials, self.study.file.goal)
        source = self.folder / best.name / "recipe.yaml" if best else None
        if best is None or source is None or not source.is_file():
            return
        recipe = self.recipe.best(yaml.safe_load(source.read_text(encoding="utf-8")))
        file = self.folder / "best.yaml"
        head = f"# {best.name} of a sweep: {self.study.file.metric} {best.metric}\n#\n#   bumblebee fit --config {file}\n\n"
        write_text(file, head + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))


def _drawn(value: Value) -> Value:
    """A value on an axis: numbers as they are, everything else as text."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else format_value(value)
