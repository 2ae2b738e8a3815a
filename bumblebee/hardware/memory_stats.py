"""Memory of one process, its peak, and what is available: allocated bytes on a GPU, resident set size (RSS) on a CPU."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def memory_allocated(device: torch.device) -> int:
    """Bytes in use now: allocated tensors on a GPU, the RSS on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _proc_bytes(_STATUS, "VmRSS") or max_memory_allocated(device)


def max_memory_allocated(device: torch.device) -> int:
    """Peak of ``memory_allocated`` in bytes, since the start of the process or the last ``reset_peak_memory_stats``."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if peak := _proc_bytes(_STATUS, "VmHWM"):
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory_stats(device: torch.device) -> None:
    """Reset the peak. Does nothing on a CPU where the system does not support it."""
    if device.type == "cuda":
        torch.cuda.init()  # it raises before the first allocation otherwise
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_REFS.exists():
        try:
            _CLEAR_REFS.write_text("5")
        except OSError:  # some containers do not permit it
            return


def memory_available(device: torch.device) -> int | None:
    """Bytes that another process could allocate on the device; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _proc_bytes(_MEMINFO, "MemAvailable")


def free_gpu_memory(device: torch.device) -> int:
    """Bytes that this process can allocate on a GPU: free ones, and those that torch holds for reuse without using them."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _proc_bytes(file: Path, field: str) -> int | None:
    """Bytes from a line such as ``VmRSS:  1234 kB`` of a file in /proc."""
    if not file.exists():
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else None
