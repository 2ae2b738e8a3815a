"""Prepacked weights for CPU inference: oneDNN's blocked layout, and one matmul for layers with the same input.

oneDNN reads a weight in the checkpoint's layout slowly, or reorders it at every call. Prepacked, a matmul with up to 16 rows,
as in decode, takes a third to nine tenths of the time (figures: docs/lab-log.md).

Weights are packed one after the other and each original is freed, so there is never a second model in memory; only a head tied
to the embedding gets a copy. The operators are torch's own, used by torch.compile when it freezes a model; they have no public
name.
"""

from __future__ import annotations

import platform
from typing import TypeGuard

import torch
from torch import Tensor, nn

from bumblebee.inference.placement.shared_matmul import SharedLinear, SharedMatmul, groups_of, joined_biases, share_matmul
from bumblebee.nn.lm_head import LMHead


class PrepackedMatmul(SharedMatmul):
    """A matmul with a weight in oneDNN's layout.

    Args:
        layers: linear layers of the same input width, all with a bias or all without.
        shared: another module holds the weight too; it is then not a parameter here, so that it is counted once.
    """

    def __init__(self, layers: list[nn.Linear], shared: bool = False) -> None:
        super().__init__([layer.out_features for layer in layers])
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat([layer.weight.detach() for layer in layers]))
        self.weight = packed if shared else nn.Parameter(packed, requires_grad=False)
        self.bias = joined_biases(layer.bias for layer in layers)

    def matmul(self, x: Tensor) -> Tensor:
        """See the base class."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def stored_weight(self) -> Tensor:
        """See the base class."""
        return self.weight.detach().to_dense()


class PrepackedLinear(SharedLinear):
    """One of the layers of a ``PrepackedMatmul``, or a head."""

    def forward(self, x: Tensor, labels: None = None) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        assert labels is None, "a prepacked head computes logits, not losses"
        return self.matmul.output(x, self.index)


def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this CPU supports prepacked weights of a dtype. Untested outside x86, so disabled there."""
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return False
    supported = {torch.float32: True, torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported()}
    return supported.get(dtype, False)


def prepack(model: nn.Module) -> None:
    """Prepack all plain linear layers on the CPU, in place; layers that cannot be prepacked stay unchanged."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in list(model.modules()):
        for names in groups_of(module):
            layers = [layer for name in names if _is_prepackable(layer := getattr(module, name, None))]
            kinds = {(layer.bias is None, layer.weight.dtype) for layer in layers}
            share_matmul(module, names, layers, kinds, PrepackedMatmul, PrepackedLinear)
        for name, child in list(module.named_children()):
            if _is_prepackable(child):
                setattr(module, name, PrepackedLinear(PrepackedMatmul([child], shared=id(child.weight) in tables), 0))


def _is_prepackable(layer: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether a module is a plain linear layer on the CPU, not a subclass with a forward of its own."""
    if not isinstance(layer, nn.Linear) or type(layer) not in (nn.Linear, LMHead):
        return False
    return layer.weight.device.type == "cpu" and can_prepack(layer.weight.dtype)
