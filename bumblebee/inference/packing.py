"""Weights in the layout that the CPU's matrix products want.

oneDNN can read a weight as it lies in a model folder, but then it reads it slowly, or copies it into its own order at every
call. Packed once, a product with up to 16 rows, which is what growing texts consist of, takes a third to nine tenths of the
time (docs/lab-log.md). One weight is packed after the other and the plain one is let go of, so no second model is held; only a
head that shares the embedding's table gets a copy of it. The operators are torch's own, which torch.compile uses when it
freezes a model; they have no public name.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn

from bumblebee.nn.head import Head


class PackedLinear(nn.Module):
    """A linear layer that only computes: its weight cannot be trained. In a state dict it is a plain one.

    Args:
        linear: the layer whose weight is packed.
        shared: its weight is another module's too: this one is no parameter of the model, which is counted once.
    """

    def __init__(self, linear: nn.Linear, shared: bool) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.weight = packed if shared else nn.Parameter(packed, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor, labels: None = None) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        assert labels is None, "a packed head gives logits, no losses"
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight.detach().to_dense()


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies packed weights of the dtype. Others than x86 were not tried."""
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return False
    supported = {torch.float32: True, torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported()}
    return supported.get(dtype, False)


def pack(model: nn.Module) -> None:
    """Pack the weights of all plain linear layers on the CPU, in place; those that it cannot be done for stay as they are."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and type(child) in (nn.Linear, Head) and _fits(child.weight):
                setattr(module, name, PackedLinear(child, shared=id(child.weight) in tables))


def _fits(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and can_pack(weight.dtype)
