"""Probe of torch's SDPA: its kernels for the calls of Bumblebee, the cost of a new length, and whether gradients are finite.

    python -m benchmarks.gpu.probe --device cuda

With cuDNN's attention, which Bumblebee turns off (``bumblebee/hardware/cuda.py``), and without it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.results import report
from benchmarks.kernels.harness import seconds_of

LENGTHS = {"cuda": (512, 777, range(900, 916)), "cpu": (32, 41, range(50, 52))}  # training, decoding, new ones
NAN_LENGTHS = {"cuda": (192, 640, 704), "cpu": (16,)}  # T % 128 == 64 is where cuDNN 9.20 returned NaN


def main(device: str) -> None:
    for cudnn in (True, False):
        if device == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for name, call in calls(device).items():
            try:
                report(call=name, cudnn=cudnn, kernels=kernel_names(call, device))
            except RuntimeError as error:  # the backend refuses it: that is what this part is to show
                report(call=name, cudnn=cudnn, error=str(error).splitlines()[0])
        new, same = length_costs(device)
        report(cudnn=cudnn, new_length_ms=1e3 * new, same_length_ms=1e3 * same)
        for length in NAN_LENGTHS[device]:
            report(cudnn=cudnn, length=length, non_finite_gradients=non_finite_gradients(length, device))


def calls(device: str) -> dict[str, Callable[[], Tensor]]:
    """Attention of packed training, and of decoding one sequence and several."""
    length, cached, _ = LENGTHS[device]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    q, k = draw(2, 10, length, 128), draw(2, 10, length, 128)
    one, keys = draw(1, 2, 6, 128), draw(1, 2, cached, 128)
    several, several_keys = draw(8, 2, 6, 128), draw(8, 2, cached, 128)
    visible = torch.ones(8, 1, 1, cached, dtype=torch.bool, device=device)
    return {
        "training, causal": lambda: scaled_dot_product_attention(q, k, k, is_causal=True),
        "training, mask": lambda: scaled_dot_product_attention(q, k, k, causal),
        "decoding, one sequence": lambda: scaled_dot_product_attention(one, keys, keys),
        "decoding, eight": lambda: scaled_dot_product_attention(several, several_keys, several_keys, visible),
    }


def kernel_names(call: Callable[[], Tensor], device: str) -> list[str]:
    """Names of the kernels that a call runs on the GPU; on a CPU those of torch's operators."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]) as profiler:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    return sorted({event.key[:80] for event in profiler.key_averages()})


def length_costs(device: str) -> tuple[float, float]:
    """Median seconds of decoding with a number of keys that was not used before, and again with the same."""
    new, same = [], []
    for length in LENGTHS[device][2]:
        q, k = (torch.randn(1, 2, count, 128, device=device, dtype=torch.bfloat16) for count in (6, length))
        for times in (new, same):
            times.append(seconds_of(lambda: scaled_dot_product_attention(q, k, k), torch.device(device)))  # noqa: B023
    return statistics.median(new), statistics.median(same)


def non_finite_gradients(length: int, device: str) -> int:
    """NaN and infinite gradients of queries whose logsumexp is far below zero, under a mask (pytorch/pytorch#196678)."""
    q, k, v = (0.1 * torch.randn(1, 1, length, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    q[..., 0], k[..., 0] = 1.0, -960.0
    q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    out = scaled_dot_product_attention(q, k, v, mask)
    return sum(int((~gradient.isfinite()).sum()) for gradient in torch.autograd.grad(out.sum(), (q, k, v)))


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", choices=["cpu", "cuda"], required=True)
    main(arguments.parse_args().device)
