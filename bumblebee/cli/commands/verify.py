"""``bumblebee verify``: check that training is numerically correct on this machine, and benchmark it."""

from __future__ import annotations

from collections.abc import Sequence

from bumblebee.cli.errors.reporting import run_errors
from bumblebee.cli.errors.value_errors import user_errors
from bumblebee.cli.parser import Parser, command_parser
from bumblebee.verify.verify_options import VerifyOptions


def parser() -> Parser:
    """Return the options of the command."""
    options = command_parser("verify")
    options.add_class_arguments(VerifyOptions, None)
    return options


def run(words: Sequence[str]) -> None:
    """Execute the command; the exit code is 1 if a check fails."""
    options = parser()
    cfg = options.parse(words)
    with user_errors(cfg, options.words):
        from bumblebee.verify.verification import Verification

        verification = Verification(VerifyOptions(**cfg.as_dict()))
    with run_errors():
        passed = verification.run()
    raise SystemExit(not passed)
