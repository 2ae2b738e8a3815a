"""The feed-forward part of a block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # by Hugging Face's names
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class GatedFFN(nn.Module):
    """``down(act(gate(x)) * up(x))``; with silu it is a SwiGLU, with gelu a GEGLU (arXiv 2002.05202).

    Args:
        hidden_size: width of input and output.
        intermediate_size: width in between.
        activation: one of ``ACTIVATIONS``.
        bias: whether the three layers have biases.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "silu", bias: bool = False) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, hidden_size) -> (B, T, hidden_size)."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class PlainFFN(nn.Module):
    """``down(act(up(x)))`` (arXiv 1706.03762).

    Args:
        hidden_size: width of input and output.
        intermediate_size: width in between.
        activation: one of ``ACTIVATIONS``.
        bias: whether both layers have biases.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "relu", bias: bool = False) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, hidden_size) -> (B, T, hidden_size)."""
        return self.down_proj(self.activation(self.up_proj(x)))
