"""Settings of torch that hold wherever a CUDA device is taken."""

from __future__ import annotations

import torch


def configure_cuda(device: str | torch.device) -> None:
    """Turn off cuDNN's attention, which torch prefers on H100 and newer. Call it wherever a device is taken.

    Its backward pass returns NaN for some masks (pytorch/pytorch#196678, torch 2.13 with cuDNN 9.20), its decoding on B200 can
    be wrong (pytorch/pytorch#193893), and it plans anew for every new length, tens of milliseconds for every decoded token.
    Without it torch takes its flash or memory-efficient kernel. Devices other than CUDA change nothing.
    """
    if torch.device(device).type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
