"""Weights in the layout that the CPU's matrix products want, and one product where several have the same input.

oneDNN can read a weight as it lies in a model folder, but then it reads it slowly, or copies it into its own order at every
call. Packed once, a product with up to 16 rows, which is what growing texts consist of, takes a third to nine tenths of the
time. Queries, keys and values are one product, and so are the two that a gated feed-forward part begins with: with few rows a
call costs about as much as its work (figures: docs/lab-log.md). The layers keep their names, and in a state dict their weights.

One weight is packed after the other and the plain one is let go of, so no second model is held; only a head that shares the
embedding's table gets a copy of it. The operators are torch's own, which torch.compile uses when it freezes a model; they have
no public name.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from bumblebee.nn.attention import Attention
from bumblebee.nn.lm_head import LMHead
from bumblebee.nn.mlp import GatedMLP

TOGETHER: dict[type[nn.Module], tuple[str, ...]] = {  # layers that are called with the same input
    Attention: ("q_proj", "k_proj", "v_proj"),
    GatedMLP: ("gate_proj", "up_proj"),
}


@dataclass(slots=True)
class _Computed:
    """What a product has computed, until each layer has asked for its part. Not the module's own: setting those takes long."""

    input: Tensor | None = None
    outputs: dict[int, Tensor] = field(default_factory=dict)


class Product(nn.Module):
    """One matrix product for some linear layers. The first of them that is called with an input computes it for all.

    Args:
        layers: linear layers of the same input width, all with a bias or none.
        shared: the weight is another module's too: this one is no parameter of the model, which is counted once.
    """

    def __init__(self, layers: list[nn.Linear], shared: bool = False) -> None:
        super().__init__()
        self.widths = [layer.out_features for layer in layers]
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat([layer.weight.detach() for layer in layers]))
        self.weight = packed if shared else nn.Parameter(packed, requires_grad=False)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        self._computed = _Computed()

    def of(self, x: Tensor, number: int) -> Tensor:
        """The output of one of the layers: (..., in_features) -> (..., its out_features)."""
        if len(self.widths) == 1:
            return self._of_all(x)
        computed = self._computed
        if x is not computed.input or number not in computed.outputs:
            computed.input, computed.outputs = x, dict(enumerate(self._of_all(x).split(self.widths, dim=-1)))
        wanted = computed.outputs.pop(number)
        if not computed.outputs:
            computed.input = None
        return wanted

    def _of_all(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Its layers save themselves."""


class PackedLinear(nn.Module):
    """A linear layer that only computes: its weight cannot be trained. In a state dict it is a plain one.

    Args:
        product: of the layer and its like.
        number: which of the product's layers it is.
    """

    def __init__(self, product: Product, number: int) -> None:
        super().__init__()
        self.product, self.number = product, number

    def forward(self, x: Tensor, labels: None = None) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        assert labels is None, "a packed head gives logits, no losses"
        return self.product.of(x, self.number)  # not called as a module: with few rows even that would count

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        product = self.product
        destination[prefix + "weight"] = product.weight.detach().to_dense().split(product.widths)[self.number].clone()
        if product.bias is not None:
            destination[prefix + "bias"] = product.bias.detach().split(product.widths)[self.number].clone()


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
        for kind, names in TOGETHER.items():
            if isinstance(module, kind):
                _pack_together(module, names)
        for name, child in list(module.named_children()):
            if _fits(child):
                setattr(module, name, PackedLinear(Product([child], shared=id(child.weight) in tables), 0))


def _pack_together(module: nn.Module, names: tuple[str, ...]) -> None:
    layers = [layer for name in names if _fits(layer := getattr(module, name, None))]
    if len(layers) == len(names) and len({(layer.bias is None, layer.weight.dtype) for layer in layers}) == 1:
        product = Product(layers)
        for number, name in enumerate(names):
            setattr(module, name, PackedLinear(product, number))


def _fits(layer: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether it is a plain linear layer that can be packed."""
    if not isinstance(layer, nn.Linear) or type(layer) not in (nn.Linear, LMHead):
        return False
    return layer.weight.device.type == "cpu" and can_pack(layer.weight.dtype)
