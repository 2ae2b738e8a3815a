"""ProgressBar: how far the run is. A bar where somebody watches a terminal, a plain line now and then where nobody does."""

from __future__ import annotations

import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from bumblebee.callback import Callback
from bumblebee.formatting import duration, number, short
from bumblebee.training.metric_formatting import validation_sentence

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer

_SHOWN = {"loss": "loss", "rewards/accuracies": "accuracy", "lr": "lr"}  # of the metrics
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}, {remaining} left{postfix}]"


class ProgressBar(Callback):
    """Shows step, loss, learning rate, tokens per second and the time left.

    Args:
        refresh: seconds between two drawings of the bar on a terminal.
        interval: seconds between two lines where the output is not a terminal.

    Raises:
        ValueError: a negative number of seconds.
    """

    def __init__(self, refresh: float = 0.2, interval: float = 30.0) -> None:
        for name, value in (("refresh", refresh), ("interval", interval)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.refresh, self.interval = refresh, interval
        self._display: _Bar | _Lines | None = None
        self._marks: deque[tuple[float, int]] = deque(maxlen=20)  # (time, tokens) of the last lines of metrics
        self._tokens_per_second = 0.0  # not known yet

    def on_fit_start(self, trainer: Trainer) -> None:
        """Choose how to show it; nothing is drawn yet, since other callbacks may have something to say first."""
        if trainer.is_main:
            watched = sys.stdout.isatty() and sys.stderr.isatty()
            total, done = trainer.plan.max_steps, trainer.step
            self._display = _Bar(total, done, self.refresh) if watched else _Lines(total, done, self.interval)
        self._restart_clock(trainer)

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """New numbers beside the bar, or a line if it is time for one."""
        if self._display is not None:
            self._measure(trainer)
            shown = [f"{label} {number(metrics[name])}" for name, label in _SHOWN.items() if name in metrics]
            if self._tokens_per_second:
                shown.append(f"{short(self._tokens_per_second)} tokens/s")
            self._display.numbers(trainer.step, " · ".join(shown))

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """A line of its own."""
        if self._display is not None:
            self._display.note(validation_sentence(trainer.step, metrics))
        self._restart_clock(trainer)

    def on_checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        """Tokens per second are those of training alone."""
        self._restart_clock(trainer)

    def on_save(self, trainer: Trainer) -> None:
        """Move the bar; here and not when the step ends, so that it is drawn together with the step's numbers."""
        if self._display is not None:
            self._display.move(trainer.step)
        if trainer.step == trainer.plan.max_steps or trainer.should_stop:
            self._close()  # before other callbacks say what they say at the end

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Leave the terminal to the error message."""
        self._close()

    def on_fit_end(self, trainer: Trainer) -> None:
        """For a run that had no step left to do."""
        self._close()

    def _close(self) -> None:
        if self._display is not None:
            self._display.close()
        self._display = None

    def _restart_clock(self, trainer: Trainer) -> None:
        self._marks.clear()
        self._marks.append((time.monotonic(), trainer.tokens))

    def _measure(self, trainer: Trainer) -> None:
        self._marks.append((time.monotonic(), trainer.tokens))
        (began, before), (now, tokens) = self._marks[0], self._marks[-1]
        if tokens > before:  # not in the step of a restart
            self._tokens_per_second = (tokens - before) / max(now - began, 1e-9)


class _Bar:
    """tqdm's bar on standard error."""

    def __init__(self, total: int, done: int, refresh: float) -> None:
        from tqdm import tqdm

        # miniters=1: the clock alone decides when to draw; else steps that become slower freeze the bar.
        # delay: above zero it keeps tqdm from drawing at once.
        self._tqdm = tqdm(
            total=total, initial=done, mininterval=refresh, miniters=1, delay=1e-9,
            dynamic_ncols=True, bar_format=_BAR, file=sys.stderr,
        )  # fmt: skip

    def numbers(self, step: int, text: str) -> None:
        self._tqdm.set_postfix_str(text, refresh=False)

    def move(self, step: int) -> None:
        self._tqdm.update(step - self._tqdm.n)

    def note(self, text: str) -> None:
        self._tqdm.write(text)

    def close(self) -> None:
        self._tqdm.close()


class _Lines:
    """Plain lines on standard output: the first, the last, and one an interval."""

    def __init__(self, total: int, done: int, interval: float) -> None:
        self._total, self._done, self._interval = total, done, interval
        self._began = time.monotonic()
        self._next = self._began
        self._waiting: str | None = None

    def numbers(self, step: int, text: str) -> None:
        now = time.monotonic()
        left = (now - self._began) / (step - self._done) * (self._total - step)
        self._waiting = f"step {step:,}/{self._total:,} · {text} · {duration(left)} left"
        if now >= self._next or step == self._total:
            self._next = now + self._interval
            self._show_waiting()

    def move(self, step: int) -> None:
        """A line has no place to move to."""

    def note(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        self._show_waiting()

    def _show_waiting(self) -> None:
        if self._waiting is not None:
            print(self._waiting, flush=True)
        self._waiting = None
