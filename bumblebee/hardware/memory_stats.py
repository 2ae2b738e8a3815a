"""How much memory a process holds on its device, has held at most, and could have. On a CPU that is resident memory."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def held(device: torch.device) -> int:
    """Bytes held now."""
    import torch

    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _of_process("VmRSS") or most_held(device)


def most_held(device: torch.device) -> int:
    """The most bytes held at any time since the start, or since ``forget_most``."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if peak := _of_process("VmHWM"):
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_most(device: torch.device) -> None:
    """Let ``most_held`` begin anew, where the system can: on Linux, and on a GPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _RESET.exists():
        try:
            _RESET.write_text("5")
        except OSError:  # not everywhere may a process do that
            return


def free(device: torch.device) -> int | None:
    """Bytes that are left on the device for another process; None where that is not known."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _in_file(Path("/proc/meminfo"), "MemAvailable")


def _of_process(field: str) -> int | None:
    return _in_file(_STATUS, field)


def _in_file(file: Path, field: str) -> int | None:
    """Bytes of a line such as ``VmRSS:  1234 kB``."""
    if not file.exists():
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
