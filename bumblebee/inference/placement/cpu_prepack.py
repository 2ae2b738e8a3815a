"""Prepacked weights for CPU inference: oneDNN's blocked layout, and one matmul for layers with the same input.

oneDNN reads a weight in the checkpoint's layout slowly, or reorders it at every call. Prepacked, a matmul with up to 16 rows,
as in decode, takes a third to nine tenths of the time. The query, key and value projections are one matmul, and so are the gate
and up
projections: with few rows a call costs about as much as its work (figures: docs/lab-log.md). Layers keep their names, and the
    state
dict keeps its keys and values.

Weights are packed one after the other and each original is freed, so there is never a second model in memory; only a head tied
to the embedding gets a copy. The operators are torch's own, used by torch.compile when it freezes a model; they have no public
name.
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

SAME_INPUT: dict[type[nn.Module], tuple[str, ...]] = {  # layers that are called with the same input
    Attention: ("q_proj", "k_proj", "v_proj"),
    GatedMLP: ("gate_proj", "up_proj"),
}


@dataclass(slots=True)
class _Pending:
    """Outputs of a fused matmul that its layers have not asked for yet. Not attributes of the module: setting those is slow."""

    input: Tensor | None = None
    outputs: dict[int, Tensor] = field(default_factory=dict)


class SharedMatmul(nn.Module):
    """One matmul for one or several linear layers. The first layer called with an input computes the outputs of all.

    Args:
        widths: number of outputs of each layer.
    """

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.widths = widths
        self._pending = _Pending()

    def output(self, x: Tensor, index: int) -> Tensor:
        """Output of one of the layers: (..., in_features) -> (..., its out_features)."""
        if len(self.widths) == 1:
            return self.matmul(x)
        pending = self._pending
        if x is not pending.input or index not in pending.outputs:
            pending.input, pending.outputs = x, dict(enumerate(self.matmul(x).split(self.widths, dim=-1)))
        out = pending.outputs.pop(index)
        if not pending.outputs:
            pending.input = None
        return out

    def matmul(self, x: Tensor) -> Tensor:
        """Outputs of all layers, biases included: (..., in_features) -> (..., sum of widths)."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save nothing: the layers save their own parts."""


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
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None

    def matmul(self, x: Tensor) -> Tensor:
        """See the base class."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PrepackedLinear(nn.Module):
    """A linear layer for inference; in a state dict it is an ordinary one.

    Args:
        matmul: shared by the layers with the same input.
        index: of this layer in ``matmul``.
    """

    def __init__(self, matmul: PrepackedMatmul, index: int) -> None:
        super().__init__()
        self.matmul, self.index = matmul, index

    def forward(self, x: Tensor, labels: None = None) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        assert labels is None, "a prepacked head computes logits, not losses"
        return self.matmul.output(x, self.index)  # not matmul(...): with few rows even a module call takes noticeable time

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        matmul = self.matmul
        destination[prefix + "weight"] = matmul.weight.detach().to_dense().split(matmul.widths)[self.index].clone()
        if matmul.bias is not None:
            destination[prefix + "bias"] = matmul.bias.detach().split(matmul.widths)[self.index].clone()


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
        for parent, names in SAME_INPUT.items():
            if isinstance(module, parent):
                _prepack_together(module, names)
        for name, child in list(module.named_children()):
            if _is_prepackable(child):
                setattr(module, name, PrepackedLinear(PrepackedMatmul([child], shared=id(child.weight) in tables), 0))


def _prepack_together(module: nn.Module, names: tuple[str, ...]) -> None:
    layers = [layer for name in names if _is_prepackable(layer := getattr(module, name, None))]
    if len(layers) == len(names) and len({(layer.bias is None, layer.weight.dtype) for layer in layers}) == 1:
        matmul = PrepackedMatmul(layers)
        for index, name in enumerate(names):
            setattr(module, name, PrepackedLinear(matmul, index))


def _is_prepackable(layer: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether a module is a plain linear layer on the CPU, not a subclass with a forward of its own."""
    if not isinstance(layer, nn.Linear) or type(layer) not in (nn.Linear, LMHead):
        return False
    return layer.weight.device.type == "cpu" and can_prepack(layer.weight.dtype)
