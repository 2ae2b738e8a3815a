"""Prints the bytes that reading a model folder took at most, and those that the model takes.

python peak_of_a_load.py FOLDER DTYPE
"""

from __future__ import annotations

import gc
import re
import sys
import tempfile
import threading
from pathlib import Path

import torch

from bumblebee import Bumblebee, BumblebeeConfig


def anonymous() -> int:
    """Bytes that are this process's own: pages of files that are looked at can be dropped at any time."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def main(folder: str, dtype: str) -> None:
    with tempfile.TemporaryDirectory() as small:  # what is imported and made the first time is not looked at
        Bumblebee(BumblebeeConfig.preset("tiny", num_hidden_layers=1)).save_pretrained(small)
        Bumblebee.from_pretrained(small, dtype=torch.bfloat16)
    gc.collect()
    peak, before, stop = 0, anonymous(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.0005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = Bumblebee.from_pretrained(folder, dtype=getattr(torch, dtype))
    stop.set()
    watcher.join()
    print(max(peak, anonymous()) - before, sum(parameter.nbytes for parameter in model.parameters()))


if __name__ == "__main__":
    main(*sys.argv[1:])
