"""Print the peak memory of loading a model folder, and the size of the model, in bytes.

python load_peak.py FOLDER DTYPE
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


def anonymous_memory() -> int:
    """Resident anonymous memory in bytes; unlike memory-mapped pages, it cannot be reclaimed."""
    match = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match
    return int(match[1]) * 1024


def main(folder: str, dtype: str) -> None:
    with tempfile.TemporaryDirectory() as small:  # warm up imports and caches
        Bumblebee(BumblebeeConfig.preset("tiny", num_hidden_layers=1)).save_pretrained(small)
        Bumblebee.from_pretrained(small, dtype=torch.bfloat16)
    gc.collect()
    peak, before, stop = 0, anonymous_memory(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.0005):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = Bumblebee.from_pretrained(folder, dtype=getattr(torch, dtype))
    stop.set()
    watcher.join()
    print(max(peak, anonymous_memory()) - before, sum(parameter.nbytes for parameter in model.parameters()))


if __name__ == "__main__":
    main(*sys.argv[1:])
