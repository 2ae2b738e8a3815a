"""Run on two ranks by test_waiting_ranks.py: the first prepares something for longer than a collective may take, then fails."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from bumblebee.distributed import process_group
from bumblebee.distributed.local_main_first import local_main_first
from bumblebee.distributed.process_group import OtherRankFailed

TIMEOUT = 3  # seconds of a collective


def main(folder: Path) -> None:
    """Write what this rank has seen."""
    seen = []
    process_group.start(torch.device("cpu"), timedelta(seconds=TIMEOUT))
    with local_main_first() as first:
        if first:
            time.sleep(2 * TIMEOUT)
            (folder / "prepared").write_text("complete")
        seen.append((first, (folder / "prepared").read_text()))
    try:
        with local_main_first() as first:
            assert first, "the others must not get here"
            raise ValueError("no such file")
    except (ValueError, OtherRankFailed) as error:
        seen.append((type(error).__name__, str(error)))
    with local_main_first() as first:
        seen.append((first, "again"))
    (folder / f"rank-{process_group.rank()}").write_text(repr(seen))
    process_group.stop(orderly=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
