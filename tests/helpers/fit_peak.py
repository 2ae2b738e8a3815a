"""Run ``bumblebee fit`` and print its peak memory in bytes, above the memory of a process that has imported everything.

python tests/helpers/fit_peak.py ARGUMENTS
"""

from __future__ import annotations

import gc
import pkgutil
import sys
from importlib import import_module

import torch


def main(words: list[str]) -> None:
    """Run the command and print the peak."""
    import bumblebee
    import datamodules
    from bumblebee.cli.main import main
    from bumblebee.distributed.deepspeed.operators import import_deepspeed
    from bumblebee.hardware.memory_stats import max_memory_allocated, memory_allocated, reset_peak_memory_stats

    device = torch.device("cpu")
    import_deepspeed(device)
    for package in (bumblebee, datamodules):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                import_module(module.name)
    import peft  # noqa: F401
    import tokenizers  # noqa: F401

    gc.collect()
    baseline = memory_allocated(device)
    reset_peak_memory_stats(device)
    main(["fit", *words])
    print(max_memory_allocated(device) - baseline)


if __name__ == "__main__":
    main(sys.argv[1:])
