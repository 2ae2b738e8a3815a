"""Sweep: a search space, a recipe and a folder; what ``bumblebee sweep`` runs.

output_dir/sweep/study.db             the storage, unless --storage names another
output_dir/sweep/base.yaml            the recipe that trials change
output_dir/sweep/trial-0000/          a run: recipe.yaml, metrics.jsonl, checkpoints, and its output in output.txt
output_dir/sweep/trials.csv .md       all trials with parameters, metric, state
output_dir/sweep/best.yaml            the recipe of the best trial
output_dir/sweep/*.png                plots
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from bumblebee.sweep import study as studies
from bumblebee.sweep.display import Display
from bumblebee.sweep.errors import SweepError
from bumblebee.sweep.ladder.ladder_report import LadderReport
from bumblebee.sweep.ladder.rungs import Ladder
from bumblebee.sweep.recipe import SweepRecipe, identity
from bumblebee.sweep.report import SweepReport
from bumblebee.sweep.runner import Launch, Outcome, Runner, Running
from bumblebee.sweep.study import Study
from bumblebee.sweep.sweep_file import SweepFile
from bumblebee.sweep.sweep_options import SweepOptions
from bumblebee.sweep.trials.devices import Devices, slots
from bumblebee.sweep.trials.file_lock import FileLock
from bumblebee.sweep.trials.trial import Trial, best_of
from bumblebee.sweep.trials.trial_process import TrialProcess
from bumblebee.utils.text_files import write_text


class Sweep:
    """Prepares a sweep; ``run`` runs it.

    Args:
        file: the search space.
        recipe: that trials change.
        options: of the command.
        ladder: its rungs, if the search space is a size ladder.
        launch: returns the command of a trial; by default ``bumblebee fit``.
        poll: seconds between two looks at the running trials.

    Raises:
        SweepError: the options cannot be used, or the folder or storage holds another sweep; nothing has been written then.
    """

    def __init__(
        self,
        file: SweepFile,
        recipe: SweepRecipe,
        options: SweepOptions,
        ladder: Ladder | None = None,
        launch: Launch | None = None,
        poll: float = 0.5,
    ) -> None:
        self.file, self.recipe, self.options, self.poll = file, recipe, options, poll
        self.folder = Path(str(recipe.content["output_dir"])) / "sweep"
        self.base = self.folder / "base.yaml"
        self.launch = launch or self._launch
        self.count = _count(file, options)
        self.slots = slots(options.devices, options.parallel)
        if options.timeout is not None and not options.timeout > 0:
            raise SweepError(f"--timeout: must be more than 0, got {options.timeout:g}")
        self.study = self._open()
        self.report = SweepReport(self.study, self.folder, recipe)
        self.ladder_report = LadderReport(self.study, ladder, self.folder, recipe) if ladder else None

    def _launch(self, trial: Trial, folder: Path, devices: Devices) -> list[str]:
        return self.recipe.command(self.base, trial, folder, devices)

    def _open(self) -> Study:
        storage = self.options.storage or f"sqlite:///{self.folder / 'study.db'}"
        name = self.file.name or (str(self.recipe.content["output_dir"]) if self.options.storage else "sweep")
        known = studies.exists(storage, name)
        if known and not (self.options.resume or self.options.overwrite):
            raise SweepError(
                f"--output_dir: {storage} already holds this sweep: continue it with --resume, replace it with --overwrite,"
                " or choose another folder"
            )
        arguments = (storage, name, self.file, int(str(self.recipe.content["seed"])))
        if self.options.overwrite:
            self._check_idle()
            if known:
                Study(*arguments, {}).delete()
            shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SweepError(f"--output_dir: cannot create {self.folder}: {error.strerror}") from error
        study = Study(*arguments, identity(self.file, self.recipe))
        write_text(self.base, self.recipe.text)
        return study

    def _check_idle(self) -> None:
        """Refuse to delete a sweep that is running."""
        for folder in self.folder.glob("trial-*"):
            lock = FileLock.acquire(folder / ".sweep_worker")
            if lock is None or TrialProcess(folder).is_alive():
                raise SweepError(f"--overwrite: {folder} is running: stop it first")
            lock.release()

    def run(self) -> Outcome:
        """Run trials; the tables are written after each of them, and everything at the end.

        Raises:
            SweepError: the trials do not log the metric.
        """
        display = Display(self.study, self.count, len(self.slots))
        runner = Runner(
            self.study, self.folder, self.launch, self.count, self.slots, _Watchers(display, self.report), self.options.timeout,
            self.recipe.metrics_file(), self.poll,
        )  # fmt: skip
        outcome = runner.run()
        display.update([])
        self.report.write_tables()
        self.report.write_plots()
        return outcome

    def best(self) -> Trial | None:
        """The best complete trial."""
        return best_of(self.study.trials(), self.file.goal)


class _Watchers:
    """Shows trials, and writes the tables when one has ended."""

    def __init__(self, display: Display, report: SweepReport) -> None:
        self.display, self.report = display, report

    def update(self, running: Sequence[Running]) -> None:
        self.display.update(running)

    def started(self, running: Running, resumed: bool) -> None:
        self.display.started(running, resumed)

    def ended(self, trial: Trial, cut: str) -> None:
        self.report.write_tables()
        self.display.ended(trial, cut)


def _count(file: SweepFile, options: SweepOptions) -> int | None:
    """The number of trials; a grid has no more than its points."""
    count = options.count if options.count is not None else file.run_cap
    if count is not None and count < 1:
        raise SweepError(f"--count: must be at least 1, got {count}")
    if file.method == "grid":
        return min(count or file.grid_size(), file.grid_size())
    if count is None and options.timeout is None:
        raise SweepError(f"--count: missing: how many trials? (or run_cap in {file.path}, or --timeout)")
    return count
