"""Optimizers that look at more than one element at a time, and one that does not, as users write them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class _Optimizer(torch.optim.Optimizer):
    def __init__(self, params: Iterable[Any], lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * self.update(p, p.grad, self.state[p]))

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class Trust(_Optimizer):
    """A ratio of norms per tensor, as in LARS and LAMB, and state of a number per element only."""

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        momentum = state.setdefault("momentum", torch.zeros_like(p)).lerp_(gradient, 0.1)
        return p.norm() / (momentum.norm() + 1e-6) * momentum


class Flipping(_Optimizer):
    """Elementwise, with a number and a text as state."""

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        state["scale"] = -0.3 * state.get("scale", 0.1)
        state["mode"] = "odd" if state.get("mode") == "even" else "even"
        return gradient.sign() * (2.0 if state["mode"] == "odd" else 1.0) + state["scale"]


class Whitened(_Optimizer):
    """State of any structure: a list of one matrix per dimension, and a step count, as in Shampoo."""

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        matrices = state.setdefault("matrices", [torch.eye(size).T for size in p.shape])
        state["seen"] = {"steps": state.get("seen", {"steps": 0})["steps"] + 1, "last": None}  # a dict of Python's values
        for dim, matrix in enumerate(matrices):
            rows = gradient.movedim(dim, 0).flatten(1) if p.dim() > 1 else gradient[:, None]
            matrix.lerp_(rows @ rows.T, 0.1)
            scale = matrix.diagonal().clamp(min=1e-12).rsqrt()
            gradient = gradient * scale.reshape([-1 if other == dim else 1 for other in range(p.dim())])
        return gradient / state["seen"]["steps"]


class Growing(_Optimizer):
    """A step size that it keeps in the parameter group and raises in each step, as Prodigy does."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            group["growth"] = 1.5 * group.get("growth", 1.0)

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        return gradient.sign() * self.param_groups[0].get("growth", 1.0)
