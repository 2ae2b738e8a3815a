"""Feed-forward layers: gated (SwiGLU, GEGLU) and plain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # keys are Hugging Face's names
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class GatedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``; SwiGLU with silu, GEGLU with gelu (arXiv 2002.05202).

    Args:
        hidden_size: width of input and output.
        intermediate_size: width of the inner layer.
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


class MLP(nn.Module):
    """``down(act(up(x)))`` (arXiv 1706.03762).

    Args:
        hidden_size: width of input and output.
        intermediate_size: width of the inner layer.
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
