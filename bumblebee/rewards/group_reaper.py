"""Kills the process groups of workers when the process that started them is gone, however it ended.

A program of its own, without imports of the project: it must not take memory. A worker itself cannot do this, since a worker
that hangs in C code does not run any Python. Reads "+GROUP" and "-GROUP" lines from stdin.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Follow the groups until stdin is closed, and kill those that are left."""
    groups: set[int] = set()
    for line in sys.stdin:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except OSError:  # it has ended
            pass


if __name__ == "__main__":
    main()
