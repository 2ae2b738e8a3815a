"""User errors: one line on stderr and exit code 2, without a traceback (BUMBLEBEE_TRACEBACK=1 shows it)."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from bumblebee.distributed import process_group
from bumblebee.utils.formatting import system_error
from bumblebee.utils.user_code import UserCodeError

_CANNOT_WRITE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR,
)  # fmt: skip

_HEAD_START = 5  # seconds for rank 0 to print the error: the launcher ends all ranks as soon as one has exited


class UserError(SystemExit):
    """Ends the program with exit code 2, after the error has been printed."""


def fail(message: str) -> NoReturn:
    """Print one line and exit with code 2.

    An error of all ranks is printed by the first rank of each machine, after which the launcher ends the others. A rank that
    is still there after ``_HEAD_START`` is the only one with this error, and prints it.
    """
    message = " ".join(message.split())
    line = f"bumblebee: {message}"
    _report_to_torchrun(line)
    if process_group.local_rank() != 0:
        time.sleep(_HEAD_START)
        line = f"bumblebee: rank {process_group.rank()}: {message}"
    print(line, file=sys.stderr, flush=True)
    raise UserError(2)


def _report_to_torchrun(line: str) -> None:
    """Write the error to the file that torchrun reads, so that its report ends with our line instead of "no traceback".

    torchrun itself prints a traceback whenever a rank fails; nothing in a rank can change that.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}), encoding="utf-8")


@contextmanager
def run_errors() -> Iterator[None]:
    """Report what can end a run without a bug.

    A full disk and a reward function that fails have exit code 2, a NaN loss and a lost rank 1.
    """
    try:
        yield
    except process_group.OtherRankFailed:
        raise UserError(2) from None  # that rank has reported the reason
    except RuntimeError as error:
        if not process_group.is_lost_rank(error) or os.environ.get("BUMBLEBEE_TRACEBACK"):
            raise
        reason = "see its error message, or the system log if it was killed, for example for lack of memory"
        stopping = f"another rank exited ({reason}); rank {process_group.rank()} stops"
        print(f"bumblebee: {stopping}. Resume with --trainer.resume auto", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except FloatingPointError as error:  # not a user error, but a traceback would not help
        print(f"bumblebee: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except UserCodeError as error:
        if os.environ.get("BUMBLEBEE_TRACEBACK"):
            raise
        _report_to_torchrun(f"bumblebee: {error}")
        print(f"bumblebee: {error}", file=sys.stderr, flush=True)  # by the rank that has it
        raise UserError(2) from None
    except OSError as error:
        if error.errno not in _CANNOT_WRITE and "cannot write" not in str(error):
            raise
        fail(message_of(error))


def message_of(error: Exception) -> str:
    """Return an error's message, for errors of the operating system without "[Errno N]"."""
    return system_error(error) if isinstance(error, OSError) else str(error)
