"""Entry point of ``bumblebee COMMAND --options``: finds the command and runs it.

Only the module of the named command is imported, and that imports torch only to compute, so that help is instant. A user error
ends in one line and exit code 2; a traceback is a bug in Bumblebee.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from importlib import import_module

from bumblebee import __version__
from bumblebee.cli import logs
from bumblebee.cli.commands import COMMANDS
from bumblebee.cli.errors import renamed
from bumblebee.cli.errors.reporting import fail
from bumblebee.utils.formatting import hint
from bumblebee.utils.shared_packages import NameCollision, prefer_ours

prefer_ours()  # on import, so that spawned processes, which import this module again, find our packages too

USAGE = """usage: bumblebee COMMAND [options]

{commands}

bumblebee COMMAND --help lists the options of a command. All commands accept --log_level debug|info|warning|error.
Several devices: torchrun --nproc_per_node N -m bumblebee fit ..., or deepspeed --module bumblebee fit ...
"""


def main(argv: list[str] | None = None) -> None:
    """Run the command line; ``argv`` is ``sys.argv[1:]`` by default."""
    # Idle OpenMP threads must sleep: spinning threads of several ranks compete for cores. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    add_current_folder_to_path()
    level, words = logs.pop_log_level(sys.argv[1:] if argv is None else argv)
    logs.configure(level)
    words = [word for word in words if not word.startswith("--local_rank")]  # added by launchers
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE.format(commands="\n".join(f"  {name:<12}{help}" for name, help in COMMANDS.items())), end="")
    elif words[0] == "--version":
        print(__version__)
    else:
        run(words[0], words[1:])


def run(command: str, words: list[str]) -> None:
    """Run one command with the words that follow it."""
    if command in renamed.COMMANDS:
        fail(f"command {command!r} was renamed; use 'bumblebee {renamed.COMMANDS[command]}'")
    if command not in COMMANDS:
        fail(f"unknown command {command!r}{hint(command, COMMANDS)}; available commands: {', '.join(COMMANDS)}")
    try:
        # Share these package names with the user's folders of the same name before a recipe is parsed.
        import_module("callbacks")
        import_module("datamodules")
        import_module(f"bumblebee.cli.commands.{command}").run(words)
    except NameCollision as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:  # the reader, such as ``head``, has exited: discard what is still buffered
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def add_current_folder_to_path() -> None:
    """Let a recipe name classes in the current folder, as with ``python -m``; last on the path, so that nothing is shadowed."""
    with suppress(FileNotFoundError):  # the folder has been deleted
        here = os.getcwd()  # absolute: the current folder changes while a recipe is parsed
        sys.path.extend({here} - set(sys.path))
