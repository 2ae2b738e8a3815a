"""Utilization of a GPU: the share of time in which it computes anything, as nvidia-smi shows it.

Read through ``torch.cuda.utilization``, which needs the package nvidia-ml-py. A GPU can be fully utilized by slow kernels; how
well its arithmetic units are used is told by MFU (``bumblebee/hardware/flops.py``).
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class UtilizationMeter:
    """Samples the utilization of a device. It never has samples on a CPU, nor where the driver cannot be asked.

    Args:
        device: to sample.
        interval: seconds between two samples; the driver itself averages over up to one second.
    """

    def __init__(self, device: torch.device, interval: float = 1.0) -> None:
        self.device, self.interval = device, interval
        self.total, self.count = 0.0, 0
        self._available = device.type == "cuda"
        self._next = 0.0

    def sample(self) -> None:
        """Take a sample if one is due."""
        now = time.monotonic()
        if not self._available or now < self._next:
            return
        self._next = now + self.interval
        import torch

        try:
            self.total += torch.cuda.utilization(self.device) / 100
            self.count += 1
        except Exception as error:  # pynvml has its own classes, and may be missing
            self._available = False
            logger.info("GPU utilization is not logged: %s", error)

    def pop(self) -> tuple[float, int]:
        """Return the sum and the number of samples since the last call."""
        samples = (self.total, self.count)
        self.total, self.count = 0.0, 0
        return samples
