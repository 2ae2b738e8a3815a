"""Commands of the documentation: extracting them, and running them in a shell as a user would."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").glob("*.md"))]
RESEARCH = ROOT / "docs" / "research.md"  # tests/test_research.py runs its commands, with the page's own files
RL = ROOT / "docs" / "rl.md"  # tests/system/test_rl_commands.py runs its commands, with the page's own reward
SWEEPS = ROOT / "docs" / "sweeps.md"  # tests/system/test_sweep_command.py runs its commands


def commands(document: Path) -> list[str]:
    """The commands in the document's ``sh`` blocks, with continued lines joined and without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (line.split(" #")[0].strip() for line in lines) if line]


def bumblebee_words(command: str) -> list[str] | None:
    """The arguments of ``bumblebee`` in a command, with or without a launcher; None for other commands."""
    words = shlex.split(command)
    return words[words.index("bumblebee") + 1 :] if "bumblebee" in words else None


def run_in_shell(command: str, folder: Path, timeout: float) -> str:
    """Run a command in a shell without standard input. Returns its output."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=shell_environment(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def shell_environment(folder: Path) -> dict[str, str]:
    """The environment of a shell with ``bumblebee`` on its PATH."""
    program = folder / "bin" / "bumblebee"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!{sys.executable}\nfrom bumblebee.cli.main import main\n\nif __name__ == '__main__':\n    main()\n")
    program.chmod(0o755)
    path = os.pathsep.join([str(program.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


@contextmanager
def served(command: str, folder: Path) -> Iterator[int]:
    """Run the command's server on a free port, which is yielded once it accepts requests; end it as Ctrl-C does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    words = [sys.executable, "-m", "bumblebee", *shlex.split(command)[1:], "--port", str(port)]
    server = subprocess.Popen(words, cwd=folder, env=shell_environment(folder), stdout=subprocess.PIPE, text=True)
    try:
        assert any(line.startswith("ready: ") for line in server.stdout)
        yield port
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
