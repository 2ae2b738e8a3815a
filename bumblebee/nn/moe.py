"""Mixture of experts: feed-forward layers of which a router selects a few for each token.

    p = softmax(W x)                                  in fp32 (arXiv 2101.03961, section 2.4)
    S = the k experts with the largest p + b          b: a bias that balances the load, or zero (arXiv 2408.15664)
    y = sum over e in S of  g_e expert_e(x)  +  shared(x)         g_e = p_e, or p_e / sum over S of p

Choices: tokens are sorted by expert, and each expert processes all of its tokens at once. Experts have no capacity limit, so no
token is dropped. All experts of a layer share one tensor per projection, as in transformers: ZeRO-3 gathers all experts on
every rank, whichever its tokens selected. Router outputs are recorded for the auxiliary losses in ``router_losses.py``.
Shapes: N tokens, E experts, k experts per token, D hidden size, I intermediate size of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from bumblebee.nn.grouped_linear import grouped_linear
from bumblebee.nn.mlp import ACTIVATIONS, GatedMLP

ROUTERS = {"gate", "router", "shared_expert_gate"}  # last names of routers, also in models of transformers


class RouterOutput(NamedTuple):
    """Routing of a batch of tokens.

    Args:
        logits: (N, E) fp32.
        experts: (N, k) int64, the selected experts of each token.
        weights: (N, k) fp32, the weights of their outputs.
    """

    logits: Tensor
    experts: Tensor
    weights: Tensor


class Router(nn.Module):
    """Selects the top-k experts of each token.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: k.
        normalise: scale the weights of a token's experts to sum to one.
        bias: add a bias to the probabilities for the selection only. It has no gradient; ``RouterLosses`` updates it.
    """

    e_score_correction_bias: Tensor | None  # named as in transformers' DeepSeek-V3

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, normalise: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.top_k, self.normalise = top_k, normalise
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        # float(): ZeRO-3 creates new tensors in half precision while a model is built.
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts).float() if bias else None)

    def forward(self, x: Tensor) -> RouterOutput:
        """``x``: (N, D)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = nn.functional.linear(x.float(), self.weight.float())
            scores = logits.softmax(-1)
            choice = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
            experts = choice.detach().topk(self.top_k, dim=-1).indices
            weights = scores.gather(1, experts)
            if self.normalise:
                weights = weights / weights.sum(-1, keepdim=True)
        return RouterOutput(logits, experts, weights)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Keep the bias in fp32 when the model is cast: its updates are below bf16's resolution."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if before is not None and self.e_score_correction_bias is not None:
            self.e_score_correction_bias = before.to(self.e_score_correction_bias.device)
        return self


class Experts(nn.Module):
    """E gated MLPs ``down(act(gate(x)) * up(x))`` without biases, stored in two tensors.

    Args:
        num_experts: E.
        hidden_size: D.
        intermediate_size: I.
        activation: one of ``mlp.ACTIVATIONS``.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, activation: str = "silu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the outputs of each token's experts.

        Args:
            x: (N, D).
            experts: (N, k) int64, distinct for each token.
            weights: (N, k).

        Returns:
            (N, D).
        """
        gate_up: Tensor = self.gate_up_proj
        down: Tensor = self.down_proj
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
        order = experts.flatten().argsort(stable=True)
        position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        counts = torch.zeros(len(gate_up), dtype=torch.int64, device=x.device)
        counts.scatter_add_(0, experts.flatten(), torch.ones_like(order))  # bincount would synchronize with the GPU
        rows = _SortByExpert.apply(x, order, position)
        gate, up = grouped_linear(rows, gate_up, counts).chunk(2, dim=-1)
        rows = grouped_linear(self.activation(gate) * up, down, counts)
        outputs = _RestoreOrder.apply(rows, order, position).view(*experts.shape, -1)
        return (outputs * weights[..., None].to(outputs.dtype)).sum(1)


class MixtureOfExperts(nn.Module):
    """A sparse feed-forward layer: router, routed experts, and optional shared experts.

    Args:
        gate: the router.
        experts: called as ``experts(x, experts, weights)``.
        shared_experts: an MLP applied to every token, or None.
        shared_expert_gate: (N, D) -> (N, 1), whose sigmoid scales the shared output; None for no gate.
    """

    def __init__(
        self,
        gate: nn.Module,
        experts: nn.Module,
        shared_experts: nn.Module | None = None,
        shared_expert_gate: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.shared_experts = shared_experts
        self.shared_expert_gate = shared_expert_gate
        self.record: list[RouterOutput] | None = None  # router outputs are appended while it is a list

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        tokens = x.flatten(0, -2)
        routing = self.gate(tokens)
        if self.record is not None and torch.is_grad_enabled():
            self.record.append(routing)
        out = self.experts(tokens, routing.experts, routing.weights)
        if self.shared_experts is not None:
            shared = self.shared_experts(tokens)
            out = out + (shared if self.shared_expert_gate is None else self.shared_expert_gate(tokens).sigmoid() * shared)
        return out.view(x.shape)


def mixture_of_experts(
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    normalise: bool = True,
    bias: bool = False,
    n_shared_experts: int = 0,
    shared_expert_gate: bool = False,
    activation: str = "silu",
) -> MixtureOfExperts:
    """Build the standard layer. Shared experts are one MLP of their combined width."""
    shared = n_shared_experts > 0
    return MixtureOfExperts(
        Router(hidden_size, num_experts, top_k, normalise, bias),
        Experts(num_experts, hidden_size, intermediate_size, activation),
        GatedMLP(hidden_size, n_shared_experts * intermediate_size, activation) if shared else None,
        nn.Linear(hidden_size, 1, bias=False) if shared and shared_expert_gate else None,
    )


class _Context(FunctionCtx):
    """What the functions below keep for the backward pass."""

    saved_tensors: tuple[Tensor]  # position or order
    tokens: int  # N


class _SortByExpert(torch.autograd.Function):
    """(N, D) -> (N k, D), rows sorted by expert. The backward pass is a gather and a sum; index_select's adds row by row."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, order: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(position)
        ctx.tokens = len(x)
        return x.index_select(0, order // (len(order) // len(x)))

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor, None, None]:
        (position,) = ctx.saved_tensors
        return grads[0].index_select(0, position).view(ctx.tokens, -1, grads[0].shape[1]).sum(1), None, None


class _RestoreOrder(torch.autograd.Function):
    """(N k, D) sorted by expert -> (N k, D) in token order."""

    @staticmethod
    def forward(ctx: _Context, rows: Tensor, order: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, position)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0].index_select(0, order), None, None
