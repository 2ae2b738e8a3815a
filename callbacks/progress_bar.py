"""ProgressBar: a tqdm bar on a terminal, plain lines at intervals elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bumblebee.callback import Callback
from bumblebee.plotting.panels import ShownMetric
from bumblebee.training.metrics.formatting import format_validation
from bumblebee.utils.formatting import duration, short

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer

_LAST = {"epoch": "epoch", "grad_norm": "grad norm"}  # metric -> label
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}, {remaining} left{postfix}]"


class ProgressBar(Callback):
    """Shows step, the task's main metrics, learning rate, tokens and steps per second, epoch, gradient norm and the time left.

    The main metrics are the loss, in preference training also the accuracy, and in reinforcement learning the reward, lengths
    and where the time goes (``Task.headline``).

    On a terminal that is too narrow for all of them, the last ones are omitted.

    Args:
        refresh: seconds between two updates of the bar on a terminal.
        interval: seconds between two lines if the output is not a terminal.

    Raises:
        ValueError: a negative number of seconds.
    """

    def __init__(self, refresh: float = 0.2, interval: float = 30.0) -> None:
        for name, value in (("refresh", refresh), ("interval", interval)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        self.refresh, self.interval = refresh, interval
        self._display: _Display | None = None
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=20)  # (time, tokens, step) of the latest logged steps
        self._tokens_per_second = self._steps_per_second = 0.0  # unknown yet

    def on_fit_start(self, trainer: Trainer) -> None:
        """Choose the display. Nothing is drawn yet, since other callbacks may print first."""
        if trainer.is_main:
            is_terminal = sys.stdout.isatty() and sys.stderr.isatty()
            total, done = trainer.plan.max_steps, trainer.step
            self._display = _Bar(total, done, self.refresh) if is_terminal else _Lines(total, done, self.interval)
        self._restart_clock(trainer)

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Show the metrics."""
        if self._display is not None:
            self._measure(trainer)
            headline = (*trainer.task.headline, ShownMetric("lr", "lr"))
            shown = [metric.format(metrics[metric.name]) for metric in headline if metric.name in metrics]
            shown += self._rates()
            shown += [f"{label} {metrics[name]:.3g}" for name, label in _LAST.items() if name in metrics]
            self._display.show_metrics(trainer.step, shown)

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Print the results on a line of their own."""
        if self._display is not None:
            self._display.print_line(format_validation(trainer.step, metrics))
        self._restart_clock(trainer)

    def on_checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        """Exclude the time of saving from tokens per second."""
        self._restart_clock(trainer)

    def on_save(self, trainer: Trainer) -> None:
        """Advance the bar; in this hook so that it is drawn together with the metrics of the step."""
        if self._display is not None:
            self._display.advance(trainer.step)
        if trainer.step == trainer.plan.max_steps or trainer.should_stop:
            self._close()  # before other callbacks print at the end of the run

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Close the bar before the error message."""
        self._close()

    def on_fit_end(self, trainer: Trainer) -> None:
        """Close the bar of a run that had no steps left."""
        self._close()

    def _close(self) -> None:
        if self._display is not None:
            self._display.close()
        self._display = None

    def _restart_clock(self, trainer: Trainer) -> None:
        self._marks.clear()
        self._marks.append((time.monotonic(), trainer.tokens, trainer.step))

    def _measure(self, trainer: Trainer) -> None:
        self._marks.append((time.monotonic(), trainer.tokens, trainer.step))
        (began, tokens_before, step_before), (now, tokens, step) = self._marks[0], self._marks[-1]
        if tokens > tokens_before:  # not so in the step of a restart of the clock
            seconds = max(now - began, 1e-9)
            self._tokens_per_second, self._steps_per_second = (tokens - tokens_before) / seconds, (step - step_before) / seconds

    def _rates(self) -> list[str]:
        if not self._tokens_per_second:
            return []
        return [f"{short(self._tokens_per_second)} tokens/s", f"{short(self._steps_per_second)} steps/s"]


def _join(parts: list[str]) -> str:
    return " · ".join(parts)


class _Display(Protocol):
    def show_metrics(self, step: int, parts: list[str]) -> None: ...
    def advance(self, step: int) -> None: ...
    def print_line(self, text: str) -> None: ...
    def close(self) -> None: ...


class _Bar:
    """A tqdm bar on stderr."""

    def __init__(self, total: int, done: int, refresh: float) -> None:
        from tqdm import tqdm

        # miniters=1: only the clock decides when to draw; otherwise the bar freezes when steps get slower.
        # delay > 0: tqdm does not draw immediately.
        self._tqdm = tqdm(
            total=total, initial=done, mininterval=refresh, miniters=1, delay=1e-9,
            dynamic_ncols=True, bar_format=_BAR, file=sys.stderr,
        )  # fmt: skip

    def show_metrics(self, step: int, parts: list[str]) -> None:
        """Show as many parts as leave room for a bar of ten columns."""
        settings = self._tqdm.format_dict
        columns, count = settings["ncols"] or 10_000, len(parts)
        while (
            count > 1 and len(self._tqdm.format_meter(**{**settings, "ncols": None, "postfix": _join(parts[:count])})) > columns
        ):
            count -= 1
        self._tqdm.set_postfix_str(_join(parts[:count]), refresh=False)

    def advance(self, step: int) -> None:
        self._tqdm.update(step - self._tqdm.n)

    def print_line(self, text: str) -> None:
        self._tqdm.write(text)

    def close(self) -> None:
        self._tqdm.close()


class _Lines:
    """Plain lines on stdout: the first and the last step, and one line per interval."""

    def __init__(self, total: int, done: int, interval: float) -> None:
        self._total, self._done, self._interval = total, done, interval
        self._began = time.monotonic()
        self._next = self._began
        self._pending: str | None = None

    def show_metrics(self, step: int, parts: list[str]) -> None:
        now = time.monotonic()
        left = (now - self._began) / (step - self._done) * (self._total - step)
        self._pending = f"step {step:,}/{self._total:,} · {_join(parts)} · {duration(left)} left"
        if now >= self._next or step == self._total:
            self._next = now + self._interval
            self._print_pending()

    def advance(self, step: int) -> None:
        """Nothing to draw."""

    def print_line(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        self._print_pending()

    def _print_pending(self) -> None:
        if self._pending is not None:
            print(self._pending, flush=True)
        self._pending = None
