"""Run all checks in order on all ranks and print the report."""

from __future__ import annotations

import logging
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from bumblebee.distributed import process_group
from bumblebee.nn.attention_kernels import select_kernel
from bumblebee.training import verification_record
from bumblebee.utils.signals import handle_signals
from bumblebee.verify.check import Check, all_checks
from bumblebee.verify.check_result import CheckResult
from bumblebee.verify.context import DTYPES, Context, resolve_options
from bumblebee.verify.rank_messages import RankMessages
from bumblebee.verify.subject import Subject
from bumblebee.verify.verify_options import VerifyOptions
from bumblebee.verify.verify_report import check_records, table, verdict
from bumblebee.verify.watchdog import Watchdog

logger = logging.getLogger(__name__)


class Verification:
    """All checks of a machine and a launcher.

    Args:
        options: the user's options.
        subject: the model and data that the user is about to train; the default checks the options of all model families.

    Raises:
        ValueError: the options cannot be used on this machine.
    """

    def __init__(self, options: VerifyOptions, subject: Subject | None = None) -> None:
        self.options, self.subject, self.messages = options, subject or Subject(), RankMessages()
        self.checks = all_checks(self.subject)
        self.device, self._parent = resolve_options(options)
        self._results: list[tuple[Check, CheckResult]] = []
        self._folder: Path | None = None

    def run(self) -> bool:
        """Run the checks, print the report on rank 0 and return whether all passed.

        Raises:
            OSError: the folder is not writable.
        """
        with _sigterm_as_keyboard_interrupt():
            try:
                context = Context(self.options, self.device, self._make_folder(), self.subject)
                logger.info(self._heading(context))
                with Watchdog(self.messages, self._give_up).running():
                    self._run_all(context)
                self._print_report()
                self._write_record()
            except KeyboardInterrupt:
                self._report_interruption()
                return False
            finally:
                self._remove_folder()
            self.messages.leave()
        return all(result.passed for _, result in self._results)

    def _run_all(self, context: Context) -> None:
        out_of_step = False
        for number, check in enumerate(self.checks, start=1):
            if out_of_step and check.collective:
                skipped = CheckResult(was_run=False, note="ranks may be out of step after the failure above")
                self._results.append((check, skipped))
                continue
            logger.info(f"check {number} of {len(self.checks)}: {check.name}")
            self.messages.begin(self._topic)
            with process_group.failures_reported_to(self._post_failure):
                own = _run_check(check, context)
            self.messages.post(self._topic, own.to_json(), failed=own.error is not None)
            results = [CheckResult.from_json(message) for message in self.messages.collect(self._topic)]
            self._results.append((check, CheckResult.merge(results)))
            # After the same error everywhere the ranks are still in step: each got equally far.
            out_of_step |= check.collective and len({result.error for result in results}) > 1

    def _post_failure(self, error: BaseException) -> None:
        """Report an error at once: on GPUs this rank may hang while it unwinds, and the watchdog then ends all ranks."""
        if isinstance(error, Exception):
            result = CheckResult(error=_describe(error), seconds=self.messages.seconds, finished_at=time.time())
            self.messages.post(self._topic, result.to_json(), failed=True)

    @property
    def _topic(self) -> str:
        """Message topic of the check in progress."""
        return f"check-{len(self._results)}"

    # -- unfinished checks ---------------------------------------------------------------------------------------------

    def _report_interruption(self) -> None:
        if process_group.is_main() and len(self._results) < len(self.checks):
            own = "was interrupted by the user, or by a launcher that lost a rank"
            others = ["has not reported"] * (self.messages.world_size - 1)
            self._give_up(self.messages.received(self._topic, process_group.store()), [own, *others], interrupted=True)

    def _give_up(self, messages: list[str | None], locations: list[str], interrupted: bool = False) -> None:
        """Report the check in progress as failed. Runs on rank 0, possibly in the watchdog's thread."""
        check = self.checks[len(self._results)]
        results = [(rank, CheckResult.from_json(message)) for rank, message in enumerate(messages) if message is not None]
        errors = sorted((result.finished_at, f"rank {rank}: {result.error}") for rank, result in results if result.error)
        waiting = [f"rank {rank} {locations[rank]}" for rank, message in enumerate(messages) if message is None]
        reason = "; ".join([error for _, error in errors[:1]] + waiting)
        self._results.append((check, CheckResult(error=reason, seconds=self.messages.seconds)))
        self._results += [(check, CheckResult(was_run=False)) for check in self.checks[len(self._results) :]]
        self._print_report()
        if not interrupted:
            self._write_record()
        self._remove_folder()

    # -- output --------------------------------------------------------------------------------------------------------

    def _heading(self, context: Context) -> str:
        o, world_size = self.options, self.messages.world_size
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return (
            f"bumblebee verify: {world_size} rank{'s' * (world_size > 1)} on {device}, precision {o.precision},"
            f" zero_stage {o.zero_stage}, attention {context.kernel}, torch {torch.__version__}"
        )

    def _print_report(self) -> None:
        if process_group.is_main():
            print(f"\n{table(self._results)}\n\n{verdict(self._results)}", flush=True)

    def _write_record(self) -> None:
        """Write verify.json, which runs in this folder refer to."""
        if not process_group.is_main():
            return
        o = self.options
        kernel = select_kernel(o.attention, DTYPES[o.precision])
        data = self.subject.run.data.fingerprint() if self.subject.run else None
        setup = verification_record.current_setup(self.device, o.precision, o.zero_stage, kernel, self.subject.config, data)
        passed = all(result.passed for _, result in self._results)
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        try:
            verification_record.write(
                self._parent, {**setup, "date": date, "passed": passed, "checks": check_records(self._results)}
            )
            logger.info(f"wrote {self._parent / verification_record.FILE}")
        except OSError as error:
            logger.warning(f"cannot write {self._parent / verification_record.FILE}: {error.strerror}")

    # -- temporary folder ----------------------------------------------------------------------------------------------

    def _make_folder(self) -> Path:
        """Create a hidden folder on rank 0 and return its path on every rank."""
        folder = ""  # if it cannot be made
        error: OSError | None = None
        if process_group.is_main():
            try:
                self._parent.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix=".bumblebee-verify-", dir=self._parent.absolute()))
                folder = str(self._folder)
            except OSError as failure:
                error = OSError(f"folder: cannot write {self._parent}: {failure.strerror}")
        if self.messages.world_size > 1:
            self.messages.post("folder", folder)
            folder = self.messages.collect("folder")[0]
        if error is not None:
            raise error
        if not folder:
            raise process_group.OtherRankFailed("rank 0 cannot write the folder; see its error message")
        return Path(folder)

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _run_check(check: Check, context: Context) -> CheckResult:
    begin = time.perf_counter()
    try:
        result = check.run(context)
    except Exception as error:  # any error fails this check only
        result = CheckResult(error=_describe(error))
    finally:
        if context.device.type == "cuda":
            with suppress(RuntimeError):  # after a CUDA error every call raises
                torch.cuda.empty_cache()
    return replace(result, seconds=time.perf_counter() - begin, finished_at=time.time())


def _describe(error: Exception) -> str:
    """The error on one line, with the innermost line of bumblebee that raised it."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    frame = next((frame for frame in frames if "bumblebee" in frame.filename), None)
    location = f" ({Path(frame.filename).name}:{frame.lineno})" if frame else ""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:400]}{location}"


@contextmanager
def _sigterm_as_keyboard_interrupt() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that the temporary folder is removed."""

    def handle(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    with handle_signals(handle, signal.SIGTERM):
        yield
