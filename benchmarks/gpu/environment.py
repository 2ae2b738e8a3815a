"""Environment: versions, GPUs, optional packages, the attention that ``auto`` takes, and the peaks of this machine.

python -m benchmarks.gpu.environment --device cuda
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu.results import report
from benchmarks.kernels.harness import measure_peaks
from bumblebee.nn.attention_kernels import KERNELS, problems, select_kernel

PACKAGES = (
    "deepspeed", "transformers", "litserve", "triton", "flash-attn", "flash-attn-3", "liger-kernel", "torchao", "nano-vllm",
    "numpy",
)  # fmt: skip


def installed(name: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main(device: str) -> None:
    report(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda, system=platform.platform())
    report(**{name: installed(name) for name in PACKAGES})
    if shutil.which("nvidia-smi") and device == "cuda":
        query = "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm,mig.mode.current"
        done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True)
        report(gpus=[line.strip() for line in done.stdout.splitlines()])
    report(
        attention=select_kernel("auto", torch.bfloat16),
        not_available={name: "; ".join(reasons) for name in KERNELS if (reasons := problems(name, torch.bfloat16))},
        cudnn=torch.backends.cudnn.version(),
        arch_list=torch.cuda.get_arch_list(),
    )
    peaks = measure_peaks(torch.device(device), torch.bfloat16)
    report(matmul_tflops=peaks.flops / 1e12, copy_gb_per_s=peaks.bytes / 1e9)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--device", choices=["cpu", "cuda"], required=True)
    sys.exit(main(arguments.parse_args().device))
