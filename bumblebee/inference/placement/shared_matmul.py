"""One matmul for linear layers that are called with the same input: query, key and value projections, and gate and up.

With few rows, as in decode, a matmul costs about as much to launch as to compute. Layers keep their names, and the state dict
keeps its keys and values. What a matmul does with its weights is up to the subclasses: prepacked for a CPU
(``cpu_prepack.py``), joined (``fused_linear.py``) or quantized (``quantized_kernels.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from bumblebee.nn.attention import Attention
from bumblebee.nn.mlp import GatedMLP

SAME_INPUT: dict[type[nn.Module], tuple[str, ...]] = {  # layers that are called with the same input
    Attention: ("q_proj", "k_proj", "v_proj"),
    GatedMLP: ("gate_proj", "up_proj"),
}

LayerT = TypeVar("LayerT", bound=nn.Module)
KindT = TypeVar("KindT", bound=Hashable)


@dataclass(slots=True)
class _Pending:
    """Outputs that the layers have not asked for yet. Not attributes of the module: setting those is slow."""

    input: Tensor | None = None
    outputs: dict[int, Tensor] = field(default_factory=dict)


class SharedMatmul(nn.Module):
    """One matmul for one or several linear layers. The first layer called with an input computes the outputs of all.

    Args:
        widths: number of outputs of each layer.
    """

    bias: nn.Parameter | None

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

    def stored_weight(self) -> Tensor:
        """The weights of all layers below each other, as in a checkpoint: (sum of widths, in_features)."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """Save nothing: the layers save their own parts."""


class SharedLinear(nn.Module):
    """One of the layers; in a state dict it is an ordinary one.

    Args:
        matmul: shared by the layers with the same input.
        index: of this layer in ``matmul``.
    """

    def __init__(self, matmul: SharedMatmul, index: int) -> None:
        super().__init__()
        self.matmul, self.index = matmul, index

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return self.matmul.output(x, self.index)  # not matmul(...): with few rows even a module call takes noticeable time

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        matmul = self.matmul
        destination[prefix + "weight"] = matmul.stored_weight().split(matmul.widths)[self.index].clone()
        if matmul.bias is not None:
            destination[prefix + "bias"] = matmul.bias.detach().split(matmul.widths)[self.index].clone()


def joined_biases(biases: Iterable[Tensor | None]) -> nn.Parameter | None:
    """The biases of some layers, one after the other; None if they have none."""
    present = [bias.detach() for bias in biases if bias is not None]
    return nn.Parameter(torch.cat(present), requires_grad=False) if present else None


def groups_of(module: nn.Module) -> list[tuple[str, ...]]:
    """The names of a module's layers that are called with the same input."""
    return [names for parent, names in SAME_INPUT.items() if isinstance(module, parent)]


def share_matmul(
    module: nn.Module,
    names: tuple[str, ...],
    layers: list[LayerT],
    kinds: set[KindT],
    make: Callable[[list[LayerT]], SharedMatmul],
    make_layer: Callable[[SharedMatmul, int], SharedLinear],
) -> None:
    """Replace layers with the same input by ones that share a matmul, if all of them can be and are of one kind.

    Args:
        module: that holds the layers.
        names: of the layers.
        layers: those of them that can be replaced.
        kinds: of ``layers``.
        make: the matmul.
        make_layer: one of its layers.
    """
    if len(layers) == len(names) and len(kinds) == 1:
        matmul = make(layers)
        for index, name in enumerate(names):
            setattr(module, name, make_layer(matmul, index))
