"""Verification: the checks, one after the other, on all ranks."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from bumblebee.distributed import process_group
from bumblebee.signals import handled_by
from bumblebee.verify.check import Check, all_checks
from bumblebee.verify.check_result import Finding
from bumblebee.verify.context import Setting, settle
from bumblebee.verify.rank_messages import Ranks
from bumblebee.verify.verify_options import VerifyOptions
from bumblebee.verify.verify_report import table, verdict


class Verification:
    """All checks of a machine and a launcher.

    Args:
        options: what the user chose.

    Raises:
        ValueError: options that cannot be met here.
    """

    def __init__(self, options: VerifyOptions) -> None:
        self.options, self.checks, self.ranks = options, all_checks(), Ranks()
        self.device, self._parent = settle(options)
        self._found: list[tuple[Check, Finding]] = []
        self._folder: Path | None = None

    def run(self) -> bool:
        """Do it and print the report on rank 0; whether all passed.

        Raises:
            OSError: the folder cannot be written.
        """
        with _terminated_by_exception():
            try:
                setting = Setting(self.options, self.device, self._make_folder())
                self._say(self._heading(setting))
                with self.ranks.watched(self._give_up):
                    self._run(setting)
                self._print_report()
            except KeyboardInterrupt:
                self._interrupted()
                return False
            finally:
                self._remove_folder()
            self.ranks.part()
        return all(finding.passed for _, finding in self._found)

    def _run(self, setting: Setting) -> None:
        stopped = False
        for number, check in enumerate(self.checks):
            if stopped and check.together:
                self._found.append((check, Finding(was_run=False, note="the ranks may be out of step after the failure above")))
                continue
            self._say(f"checking {number + 1} of {len(self.checks)}: {check.name}")
            self.ranks.begin(self._topic)
            mine = self._do(check, setting)
            self.ranks.tell(self._topic, mine.to_json(), failed=mine.error is not None)
            findings = [Finding.from_json(values) for values in self.ranks.hear(self._topic)]
            self._found.append((check, Finding.joined(findings)))
            # The same error everywhere leaves the ranks in step: each went equally far.
            errors = {finding.error for finding in findings}
            stopped |= check.together and len(errors) > 1

    @property
    def _topic(self) -> str:
        """What the ranks call the check that they are at."""
        return f"check-{len(self._found)}"

    @staticmethod
    def _do(check: Check, setting: Setting) -> Finding:
        begin = time.perf_counter()
        try:
            measured = check.measures(setting)
            measures, note = measured if isinstance(measured, tuple) else (measured, "")
            return Finding(tuple(measures), time.perf_counter() - begin, None, note, time.time())
        except Exception as error:  # whatever it is: the others still run
            return Finding((), time.perf_counter() - begin, _told(error), "", time.time())
        finally:
            if setting.device.type == "cuda":
                with suppress(RuntimeError):  # after an error of the GPU everything is one
                    torch.cuda.empty_cache()

    def _interrupted(self) -> None:
        if process_group.is_main() and len(self._found) < len(self.checks):
            mine, others = "was told to stop, by the user or by a launcher that lost a rank", "has told nothing"
            told = self.ranks.heard(self._topic, process_group.store())
            self._give_up(told, [mine, *[others] * (self.ranks.size - 1)])

    def _give_up(self, told: list[Any], places: list[str]) -> None:
        """The check that is running does not end. On rank 0, perhaps in another thread than the one that waits in it."""
        check = self.checks[len(self._found)]
        ends = [(rank, Finding.from_json(values)) for rank, values in enumerate(told) if values is not None]
        errors = sorted((finding.ended, f"rank {rank}: {finding.error}") for rank, finding in ends if finding.error is not None)
        waiting = [f"rank {rank} {places[rank]}" for rank, values in enumerate(told) if values is None]
        why = "; ".join([error for _, error in errors[:1]] + waiting)
        self._found.append((check, Finding(error=why, seconds=self.ranks.seconds)))
        rest = self.checks[len(self._found) :]
        self._found += [(check, Finding(was_run=False)) for check in rest]
        self._print_report()
        self._remove_folder()

    # -- what is shown -------------------------------------------------------------------------------------------------

    def _heading(self, setting: Setting) -> str:
        o = self.options
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return (
            f"bumblebee verify: {self.ranks.size} rank{'s' * (self.ranks.size > 1)} on {where}, precision {o.precision},"
            f" zero_stage {o.zero_stage}, attention {setting.kernel}, torch {torch.__version__}"
        )

    def _say(self, line: str) -> None:
        if process_group.is_main():
            print(line, file=sys.stderr, flush=True)

    def _print_report(self) -> None:
        if process_group.is_main():
            print(f"\n{table(self._found)}\n\n{verdict(self._found)}", flush=True)

    # -- the folder ----------------------------------------------------------------------------------------------------

    def _make_folder(self) -> Path:
        """A fresh hidden one, made by rank 0."""
        answer: dict[str, str] = {}
        error: OSError | None = None
        if process_group.is_main():
            try:
                self._parent.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix=".bumblebee-verify-", dir=self._parent.absolute()))
                answer = {"folder": str(self._folder)}
            except OSError as failure:
                error = OSError(f"folder: cannot write {self._parent}: {failure.strerror}")
        if self.ranks.size > 1:
            self.ranks.tell("folder", answer)
            answer = self.ranks.hear("folder")[0]
        if error is not None:
            raise error
        if not answer:
            raise process_group.OtherRankFailed("rank 0 cannot write the folder; its message tells why")
        return Path(answer["folder"])

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _told(error: Exception) -> str:
    """In one line, with the place in our files where it was raised."""
    place = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if "bumblebee" in f.filename), None)
    where = f" ({Path(place.filename).name}:{place.lineno})" if place else ""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:400]}{where}"


@contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that the folder is removed."""

    def handle(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    with handled_by(handle, signal.SIGTERM):
        yield
