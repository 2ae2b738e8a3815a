"""FLOPs per token of a model, and the peak FLOP/s of a device: the two parts of model FLOPs utilisation (MFU).

Counted as in PaLM (arXiv 2204.02311, appendix B): per token 6 FLOPs for each weight in a matmul (2 each for the output, the
gradient of the input and the gradient of the weight), plus 12 * layers * heads * head_dim * sequence length for attention.
Recomputation is not counted; causal masks and document boundaries are not subtracted.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from bumblebee.config import head_width
from bumblebee.distributed.deepspeed.sharded_parameters import full_numel

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bumblebee.config import TransformerConfig

# Dense TFLOP/s of 16-bit matmuls with fp32 accumulation, from NVIDIA's data sheets. An entry matches device names that contain
# all its words; the first match counts.
PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("GB300",), 2500.0),
    (("GB200",), 2500.0),
    (("B300",), 2250.0),
    (("B200",), 2250.0),
    (("H200", "NVL"), 836.0),
    (("H200",), 989.0),
    (("GH200",), 989.0),
    (("H100", "NVL"), 835.0),
    (("H100", "PCIe"), 756.0),
    (("H100",), 989.0),
    (("H800",), 989.0),
    (("H20",), 148.0),
    (("A100",), 312.0),
    (("A800",), 312.0),
    (("A40",), 149.7),
    (("A30",), 165.0),
    (("A10G",), 70.0),
    (("A10",), 125.0),
    (("L40S",), 362.0),
    (("L40",), 181.0),
    (("L4",), 121.0),
    (("RTX 5090",), 209.5),
    (("RTX 4090",), 165.2),
    (("RTX 3090",), 71.0),
)


def peak_tflops(name: str) -> float | None:
    """Peak TFLOP/s in bf16 or fp16 of the device with this name; None if it is not in the table, or is a MIG slice of a GPU."""
    words = name.replace("-", " ").split()
    if "MIG" in words:
        return None
    return next((peak for entry, peak in PEAKS if all(part in words for word in entry for part in word.split())), None)


def measure_peak_tflops(dtype: torch.dtype, seconds: float = 0.3, size: int = 512) -> float:
    """Measure the TFLOP/s of a matmul in this process on the CPU, the best of several."""
    import torch  # late, as below: the command line imports this module before it needs torch

    matrix = torch.ones(size, size, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e12


def weight_flops_per_token(model: nn.Module) -> float:
    """FLOPs per token in the weights of a model: forward, and backward where it is trained.

    An embedding table counts only if it is tied to the head, since a lookup multiplies nothing. A frozen weight has no
    gradient: 4 FLOPs instead of 6. Of routed experts only the active ones count.
    """
    from torch import nn

    heads = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - heads
    active = _active_expert_fraction(model)
    total = 0.0
    for name, parameter in model.named_parameters():
        if id(parameter) not in tables:
            flops = 6 if parameter.requires_grad else 4
            total += flops * full_numel(parameter) * (active if ".experts." in name else 1.0)
    return total


def num_active_parameters(model: nn.Module) -> int:
    """Parameters that take part in a token's forward pass: all, except routed experts that the token is not sent to."""
    active = _active_expert_fraction(model)
    return round(sum(full_numel(p) * (active if ".experts." in name else 1.0) for name, p in model.named_parameters()))


def attention_flops_per_token(model: nn.Module, length: int) -> float:
    """FLOPs of attention per token of a sequence of ``length`` tokens; 0 if the model's config lacks the dimensions.

    A layer with a sliding window counts at most the window's positions.
    """
    config: TransformerConfig | None = getattr(model, "config", None)
    layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if config is None or not layers or not heads:
        return 0.0
    window_of = getattr(config, "window_of", lambda layer: None)
    positions = sum(min(window_of(layer) or length, length) for layer in range(layers))
    return 12.0 * heads * head_width(config) * positions


def _active_expert_fraction(model: nn.Module) -> float:
    """Fraction of the routed experts that a token is sent to, by Hugging Face's config keys; 1 without experts."""
    config = getattr(model, "config", None)
    active = getattr(config, "num_experts_per_tok", None)
    keys = ("n_routed_experts", "num_experts", "num_local_experts")
    total = next((getattr(config, key) for key in keys if getattr(config, key, None)), None)
    return active / total if active and total else 1.0
