"""How many floating-point operations a training step has, and how many a device could do.

The count is PaLM's (arXiv 2204.02311, appendix B): for each token, 6 for each weight that multiplies it, two each for the
output, the gradient of the input and the gradient of the weight; and 12 * layers * heads * head width * sequence for attention.
Work that is done twice to save memory is not counted, a causal mask and packed documents are not taken off.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from bumblebee.distributed.deepspeed.sharded_parameters import full_numel

if TYPE_CHECKING:
    import torch
    from torch import nn

# Dense TFLOP/s of 16-bit matrix products with sums in fp32, from NVIDIA's data sheets. A name that holds all words of an entry
# is that device; the first entry counts.
PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("B200",), 2250.0),
    (("H200", "NVL"), 836.0),
    (("H200",), 989.0),
    (("GH200",), 989.0),
    (("H100", "NVL"), 835.0),
    (("H100", "PCIe"), 756.0),
    (("H100",), 989.0),
    (("H800",), 989.0),
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


def peak_of(name: str) -> float | None:
    """TFLOP/s of the device with this name in bf16 or fp16, None where it is not in the table."""
    words = name.replace("-", " ").split()
    return next((peak for entry, peak in PEAKS if all(part in words for word in entry for part in word.split())), None)


def measured_peak(dtype: torch.dtype, seconds: float = 0.3, size: int = 512) -> float:
    """TFLOP/s of this process on the CPU in a plain matrix product, the best of several."""
    import torch

    matrix = torch.ones(size, size, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e12


def per_token(model: nn.Module) -> float:
    """Operations for a token in the weights of a model: forward, and backward where it is trained.

    The embedding table counts only where it is the head as well: looking up a row multiplies nothing. A frozen weight needs no
    gradient, 4 instead of 6. Of routed experts only those that a token goes to count.
    """
    from torch import nn

    heads = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - heads
    share = _share_of_experts(getattr(model, "config", None))
    total = 0.0
    for name, parameter in model.named_parameters():
        if id(parameter) not in tables:
            each = 6 if parameter.requires_grad else 4
            total += each * full_numel(parameter) * (share if ".experts." in name else 1.0)
    return total


def active_parameters(model: nn.Module) -> int:
    """Parameters that one token meets: of routed experts only those that it goes to. Without any, all."""
    share = _share_of_experts(getattr(model, "config", None))
    return round(sum(full_numel(p) * (share if ".experts." in name else 1.0) for name, p in model.named_parameters()))


def of_attention(model: nn.Module, length: int) -> float:
    """Operations of attention for one token of a sequence of ``length``; 0 where the model's config does not say.

    In a layer with a sliding window no more positions count than it has.
    """
    config: Any = getattr(model, "config", None)
    layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if not layers or not heads:
        return 0.0
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    window_of = getattr(config, "window_of", lambda layer: None)
    seen = sum(min(window_of(layer) or length, length) for layer in range(layers))
    return 12.0 * heads * width * seen


def _share_of_experts(config: Any) -> float:
    """The part of the routed experts that one token is sent to, by Hugging Face's names."""
    chosen = getattr(config, "num_experts_per_tok", None)
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    total = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    return chosen / total if chosen and total else 1.0
