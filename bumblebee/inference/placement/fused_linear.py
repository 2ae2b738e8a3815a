"""One matmul for linear layers with the same input, on any device: query, key and value, and gate and up.

With few rows a matmul costs about as much to launch as to compute. Layers keep their names, and the state dict keeps its
keys and values. The weights are joined one group after the other and each original is freed, so there is never a second model
in memory. Layers that are anything else than plain ``nn.Linear`` - prepacked, quantized, with a LoRA adapter - and tied weights
stay as they are.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from bumblebee.inference.placement.cpu_prepack import SAME_INPUT, SharedMatmul


class FusedMatmul(SharedMatmul):
    """A matmul with the weights of several layers below each other.

    Args:
        layers: linear layers of the same input width, all with a bias or all without.
    """

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__([layer.out_features for layer in layers])
        self.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None

    def matmul(self, x: Tensor) -> Tensor:
        """See the base class."""
        return nn.functional.linear(x, self.weight, self.bias)


class FusedLinear(nn.Module):
    """One of the layers; in a state dict it is an ordinary one.

    Args:
        fused: shared by the layers with the same input.
        index: of this layer in ``fused``.
    """

    def __init__(self, fused: FusedMatmul, index: int) -> None:
        super().__init__()
        self.fused, self.index = fused, index

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return self.fused.output(x, self.index)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        fused = self.fused
        destination[prefix + "weight"] = fused.weight.detach().split(fused.widths)[self.index].clone()
        if fused.bias is not None:
            destination[prefix + "bias"] = fused.bias.detach().split(fused.widths)[self.index].clone()


def fuse_projections(model: nn.Module) -> None:
    """Fuse all plain linear layers that are called with the same input, in place."""
    uses = Counter(id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding))
    for module in list(model.modules()):
        for parent, names in SAME_INPUT.items():
            if isinstance(module, parent):
                _fuse(module, names, uses)


def _fuse(module: nn.Module, names: tuple[str, ...], uses: Counter[int]) -> None:
    children = [getattr(module, name, None) for name in names]
    layers = [layer for layer in children if type(layer) is nn.Linear and uses[id(layer.weight)] == 1]
    kinds = {(layer.bias is None, layer.weight.dtype, layer.weight.device) for layer in layers}
    if len(layers) == len(names) and len(kinds) == 1:
        fused = FusedMatmul(layers)
        for index, name in enumerate(names):
            setattr(module, name, FusedLinear(fused, index))
