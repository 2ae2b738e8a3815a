"""Runner: starts the trials of a sweep, reports their metric while they run, and stops those that are pruned.

What happened is in the storage and in the trials' folders, in an order that survives a kill at any point: a trial is in the
storage before its process starts, and its process has written its exit code before its result is recorded. Resuming takes the
trials that are recorded as running and whose worker is gone: it waits for processes that are still alive, records results that
nobody has recorded, and starts the others again from their checkpoints.

Several workers may share a sweep. A worker holds a lock on each of its trials, and one on the sweep while it draws a new trial.
"""

from __future__ import annotations

import math
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol

from bumblebee.checkpoint.digests import NAME as DIGESTS
from bumblebee.sweep.errors import SweepError
from bumblebee.sweep.study import Study
from bumblebee.sweep.trials.devices import Devices, environment
from bumblebee.sweep.trials.file_lock import FileLock
from bumblebee.sweep.trials.trial import Trial
from bumblebee.sweep.trials.trial_log import TrialLog
from bumblebee.sweep.trials.trial_process import TrialProcess, error_message
from bumblebee.utils.formatting import hint
from bumblebee.utils.signals import handle_signals

Outcome = Literal["finished", "timeout", "interrupted"]
Launch = Callable[[Trial, Path, Devices], list[str]]  # the command of a trial in a folder on some devices


@dataclass
class Running:
    """A trial that this worker runs.

    Args:
        trial: as it was started.
        process: of the trial.
        log: of its metrics.
        slot: its place among the trials that run at the same time.
        lock: that makes it this worker's trial.
        began: time at which this worker started it.
    """

    trial: Trial
    process: TrialProcess
    log: TrialLog
    slot: int
    lock: FileLock
    began: float
    pruned: bool = False


class Watcher(Protocol):
    """Who is told about trials, to show them."""

    def update(self, running: Sequence[Running]) -> None:
        """Called in every round."""

    def started(self, running: Running, resumed: bool) -> None:
        """A trial has been started."""

    def ended(self, trial: Trial, cut: str) -> None:
        """A trial has ended. One that was cut off, for the reason ``cut``, goes on when the sweep is resumed."""


class Runner:
    """Runs the trials of a study.

    Args:
        study: of the sweep.
        folder: of the sweep; each trial has a folder in it.
        launch: returns the command of a trial.
        count: number of trials of the sweep; None for no limit.
        slots: devices of each trial that runs at the same time.
        watcher: shows what happens.
        timeout: seconds after which running trials are stopped and saved.
        metrics_file: name of the metrics in a trial's folder.
        poll: seconds between two looks at the running trials.
    """

    def __init__(
        self,
        study: Study,
        folder: Path,
        launch: Launch,
        count: int | None,
        slots: Sequence[Devices],
        watcher: Watcher,
        timeout: float | None = None,
        metrics_file: str = "metrics.jsonl",
        poll: float = 0.5,
    ) -> None:
        self.study, self.folder, self.launch, self.count, self.slots = study, folder, launch, count, slots
        self.watcher, self.timeout, self.metrics_file, self.poll = watcher, timeout, metrics_file, poll
        self.running: list[Running] = []
        self.outcome: Outcome = "finished"
        self._left: set[int] = set()  # trials that were cut off in this session: they wait for the next one

    def run(self) -> Outcome:
        """Run trials until there are ``count``, or the time is up, or SIGINT or SIGTERM stops the sweep.

        Raises:
            SweepError: the first trials do not log the metric; the others are stopped and saved.
        """
        deadline = math.inf if self.timeout is None else time.monotonic() + self.timeout
        with handle_signals(self._on_signal, signal.SIGINT, signal.SIGTERM):
            self._stop_ended_trials()
            try:
                while self._fill_slots() or self.running:
                    self._round()
                    if time.monotonic() > deadline and self.outcome == "finished":
                        self._stop("timeout")
            except BaseException:
                self._stop("interrupted")
                self._wait()
                raise
        return self.outcome

    def _round(self) -> None:
        for running in list(self.running):
            self._advance(running)
        self.watcher.update(self.running)
        if self.running:
            time.sleep(self.poll)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Stop the sweep; a second signal does not wait for trials to save."""
        if self.outcome == "interrupted":
            for running in self.running:
                running.process.kill()
        elif self.running:
            print(
                "\nstopping the trials after their step and saving; interrupt again to stop at once",
                file=sys.stderr,
                flush=True,
            )
        self._stop("interrupted")

    def _stop(self, outcome: Outcome) -> None:
        self.outcome = outcome
        for running in self.running:
            running.process.stop()

    def _wait(self) -> None:
        """Wait for the trials that have been told to stop; their results are recorded when the sweep is resumed."""
        for running in self.running:
            while running.process.is_alive():
                time.sleep(self.poll)
            running.lock.release()
        self.running.clear()

    # -- starting ------------------------------------------------------------------------------------------------------

    def _fill_slots(self) -> bool:
        """Start trials in free slots; returns whether any was started."""
        started = False
        while self.outcome == "finished" and len(self.running) < len(self.slots):
            claimed = self._next_trial()
            if claimed is None:
                break
            self._start(*claimed)
            started = True
        return started

    def _next_trial(self) -> tuple[Trial, FileLock] | None:
        """A trial that was cut off, or a new one, with the lock on it; None if there is none to start."""
        turn = FileLock.acquire(self.folder / ".turn", wait=True)
        assert turn is not None
        with turn:
            trials = self.study.trials()
            for trial in trials:
                if trial.state == "running" and trial.host in ("", socket.gethostname()) and (lock := self._claim(trial)):
                    return self.study.complete_start(trial.number), lock
            if self.count is not None and len(trials) >= self.count:
                return None
            trial = self.study.ask()
            new_lock = self._claim(trial)
            assert new_lock is not None
            return trial, new_lock

    def _claim(self, trial: Trial) -> FileLock | None:
        if trial.number in self._left or any(trial.number == each.trial.number for each in self.running):
            return None
        folder = self.folder / trial.name
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock.acquire(folder / ".sweep_worker")

    def _start(self, trial: Trial, lock: FileLock) -> None:
        folder = self.folder / trial.name
        slot = min(set(range(len(self.slots))) - {each.slot for each in self.running})
        process, log = TrialProcess(folder), TrialLog(folder / self.metrics_file, self.study.file.metric)
        resumed = process.output.exists()
        if not process.is_alive() and _was_cut(process):
            devices = self.slots[slot]
            process.start(self.launch(trial, folder, devices), environment(devices))
        running = Running(trial, process, log, slot, lock, time.monotonic())
        self.running.append(running)
        self.watcher.started(running, resumed)

    def _stop_ended_trials(self) -> None:
        """Stop processes of pruned trials whose worker was killed before it could stop them."""
        for trial in self.study.trials():
            folder = self.folder / trial.name
            if trial.state != "running" and folder.is_dir() and (process := TrialProcess(folder)).is_alive():
                if lock := FileLock.acquire(folder / ".sweep_worker"):
                    process.stop()
                    lock.release()

    # -- watching ------------------------------------------------------------------------------------------------------

    def _advance(self, running: Running) -> None:
        is_alive = running.process.is_alive()  # before reading, so that everything it wrote is read
        running.log.read()
        if not running.pruned:
            self._report(running)
        if not is_alive:
            self._end(running)

    def _report(self, running: Running) -> None:
        """Report each value of the metric in its order, so that decisions do not depend on when it is read."""
        number, reported = running.trial.number, running.trial.reports
        for index, value in list(enumerate(running.log.values, start=1))[reported:]:
            running.trial = replace(running.trial, reports=index, metric=value)
            if self.study.report(number, index, value):
                self.study.finish(number, "pruned", value)
                running.pruned = True
                running.process.stop()
                return

    def _end(self, running: Running) -> None:
        cut = "" if running.pruned else self._record(running)
        if cut:
            self._left.add(running.trial.number)
        running.lock.release()
        self.running.remove(running)
        self.watcher.ended(self.study.trials()[running.trial.number], cut)

    def _record(self, running: Running) -> str:
        """Record the result of a process that has ended; returns the reason if the trial was cut off instead."""
        number, process, values = running.trial.number, running.process, running.log.values
        if _was_cut(process):
            return _reason(process.exit_code())
        code = process.exit_code() or 0
        if code > 0:
            reason = error_message(process.output) or f"exit code {code}"
            self.study.finish(number, "failed", message=reason)
        elif not values:
            self._record_without_metric(running)
        elif not math.isfinite(values[-1]):
            self.study.finish(number, "failed", message=f"{self.study.file.metric} is not finite")
        else:
            self.study.finish(number, "complete", values[-1])
        return ""

    def _record_without_metric(self, running: Running) -> None:
        name, known = self.study.file.metric, sorted(running.log.metrics - {"step"})
        if any(trial.reports for trial in self.study.trials()):
            self.study.finish(running.trial.number, "failed", message=f"logged no {name}")
            return
        raise SweepError(
            f"{self.study.file.at('metric.name')}: trials do not log {name!r}{hint(name, known)}; {running.log.file} has:"
            f" {', '.join(known) or 'no metrics'}. Correct the name and go on with --resume: the trained trial is kept"
        )


def _was_cut(process: TrialProcess) -> bool:
    """Whether a process that is not alive ended before its run did: killed, stopped after saving, or never started."""
    code = process.exit_code()
    # The last file of the model that a run ends with, unless it is interrupted.
    is_trained = (process.folder / DIGESTS).exists()
    return not is_trained and (code is None or code <= 0)


def _reason(code: int | None) -> str:
    if code == 0:
        return "stopped after saving"
    return "killed" if code is None else f"killed by signal {-code}"
