"""The feed-forward part of a block."""

from __future__ import annotations

from torch import Tensor, nn


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (arXiv 2002.05202), without biases.

    Args:
        hidden_size: width of input and output.
        intermediate_size: width in between.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, hidden_size) -> (B, T, hidden_size)."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
