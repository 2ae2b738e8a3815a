"""Quantization while loading: each weight is quantized and freed as soon as it is complete.

Quantized are plain linear layers and the head, and, in int8, an embedding table that is tied to the head. int4 leaves the head
in int8, as well as layers whose input size is not a multiple of the group size. As they are stored stay norms, biases, untied
embeddings, routers (their choice is discrete), the routed experts of a mixture of experts (three-dimensional parameters), and
layers of classes of their own. Folders are not changed.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeGuard

from torch import Tensor, nn

from bumblebee.nn.lm_head import LMHead
from bumblebee.nn.moe import ROUTERS
from bumblebee.nn.quantized import (
    BYTES_INT4,
    GROUP_SIZE,
    Int4Weight,
    Int8Weight,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    Scheme,
)

logger = logging.getLogger(__name__)

_WARNED_SHARE = 0.5  # of the parameters that stay unquantized


class LoadQuantizer:
    """Replaces the layers of a model that is being loaded; called with the key of each complete parameter.

    Args:
        model: its parameters are on the meta device until they are loaded.
        scheme: int8 or int4.
    """

    def __init__(self, model: nn.Module, scheme: Scheme) -> None:
        self.model, self.scheme = model, scheme
        self.heads = {id(module.weight): name for name, module in model.named_modules() if _is_linear(module, name)}
        self.tied = {
            name: self.heads[id(module.weight)]
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) and id(module.weight) in self.heads
        }
        self.total = sum(parameter.numel() for parameter in model.parameters())
        self.quantized = 0

    def __call__(self, key: str) -> bool:
        """Quantize the module of a weight. Returns whether it was replaced."""
        name, _, parameter = key.rpartition(".")
        module = self.model.get_submodule(name)
        if parameter != "weight":
            return False
        if name in self.tied:
            self._replace_table(name, module)
        elif _is_linear(module, name):
            self._set(name, QuantizedLinear(self._weight(module), module.bias, module.weight.dtype))
        else:
            return False
        return True

    def sizes(self) -> dict[Tensor, float]:
        """Bytes per element of the parameters that will be quantized."""
        modules = dict(self.model.named_modules())
        sizes: dict[Tensor, float] = {}
        for name, module in modules.items():
            if _is_linear(module, name):
                sizes[module.weight] = 1.0 if self._is_int8(module) else BYTES_INT4
        for head in self.tied.values():  # its kernel has a copy of the table
            linear = modules[head]
            assert isinstance(linear, nn.Linear)
            sizes[linear.weight] = 2.0
        return sizes

    def finish(self, folder: str | Path) -> None:
        """Report what was not quantized.

        Raises:
            ValueError: no layer was quantized.
        """
        if not self.quantized:
            raise ValueError(f"quantize: {folder} has no linear layer that can be quantized to {self.scheme}")
        rest = 1 - self.quantized / self.total
        if rest > _WARNED_SHARE:
            logger.warning(
                "quantize: %.0f %% of the parameters of %s stay as stored: routed experts, untied embeddings, and layers"
                " of other classes than nn.Linear are not quantized", 100 * rest, folder,
            )  # fmt: skip

    def _replace_table(self, name: str, module: nn.Module) -> None:
        """An embedding table and its head. The table of a subclass, which may compute something else, is left to the head."""
        assert isinstance(module, nn.Embedding)
        weight, dtype = Int8Weight.of(module.weight), module.weight.dtype
        if type(module) is nn.Embedding:
            self._set(name, QuantizedEmbedding(weight, dtype))
        head = self.model.get_submodule(self.tied[name])
        assert isinstance(head, nn.Linear)
        self._set(self.tied[name], QuantizedLinear(weight, head.bias, dtype))

    def _weight(self, layer: nn.Linear) -> QuantizedWeight:
        return (Int8Weight if self._is_int8(layer) else Int4Weight).of(layer.weight)

    def _is_int8(self, layer: nn.Linear) -> bool:
        return self.scheme == "int8" or isinstance(layer, LMHead) or layer.in_features % GROUP_SIZE != 0

    def _set(self, name: str, module: QuantizedLinear | QuantizedEmbedding) -> None:
        parent, _, last = name.rpartition(".")
        setattr(self.model.get_submodule(parent), last, module)
        self.quantized += module.hidden_parameters


def _is_linear(module: nn.Module, name: str) -> TypeGuard[nn.Linear]:
    """Whether a module is a plain linear layer; a subclass has a forward of its own."""
    return type(module) in (nn.Linear, LMHead) and name.rpartition(".")[2] not in ROUTERS
