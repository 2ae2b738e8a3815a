"""One matmul for linear layers with the same input, on any device: query, key and value, and gate and up.

The weights are joined one group after the other and each original is freed, so there is never a second model in memory. Layers
that are anything else than plain ``nn.Linear`` - prepacked, quantized, with a LoRA adapter - and tied weights stay as they are.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from bumblebee.inference.placement.shared_matmul import SharedLinear, SharedMatmul, groups_of, joined_biases, share_matmul


class FusedMatmul(SharedMatmul):
    """A matmul with the weights of several layers below each other.

    Args:
        layers: linear layers of the same input width, all with a bias or all without.
    """

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__([layer.out_features for layer in layers])
        self.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
        self.bias = joined_biases(layer.bias for layer in layers)

    def matmul(self, x: Tensor) -> Tensor:
        """See the base class."""
        return nn.functional.linear(x, self.weight, self.bias)

    def stored_weight(self) -> Tensor:
        """See the base class."""
        return self.weight.detach()


class FusedLinear(SharedLinear):
    """One of the layers of a ``FusedMatmul``."""


def fuse_projections(model: nn.Module) -> None:
    """Fuse all plain linear layers that are called with the same input, in place."""
    uses = Counter(id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding))
    for module in list(model.modules()):
        for names in groups_of(module):
            children = [getattr(module, name, None) for name in names]
            layers = [layer for layer in children if type(layer) is nn.Linear and uses[id(layer.weight)] == 1]
            kinds = {(layer.bias is None, layer.weight.dtype, layer.weight.device) for layer in layers}
            share_matmul(module, names, layers, kinds, FusedMatmul, FusedLinear)
