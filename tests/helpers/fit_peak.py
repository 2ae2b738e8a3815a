"""Trains, and prints the bytes that the process held at most above what it held with everything imported.

python peak_of_a_fit.py WORDS
"""

from __future__ import annotations

import gc
import pkgutil
import sys
from importlib import import_module

import torch


def main(words: list[str]) -> None:
    """``bumblebee fit WORDS``, watched."""
    import bumblebee
    import datamodules
    from bumblebee.cli.main import main
    from bumblebee.distributed.deepspeed.operators import import_deepspeed
    from bumblebee.hardware.memory_stats import forget_most, held, most_held

    device = torch.device("cpu")
    import_deepspeed(device)
    for package in (bumblebee, datamodules):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                import_module(module.name)
    import peft  # noqa: F401
    import tokenizers  # noqa: F401

    gc.collect()
    before = held(device)
    forget_most(device)
    main(["fit", *words])
    print(most_held(device) - before)


if __name__ == "__main__":
    main(sys.argv[1:])
