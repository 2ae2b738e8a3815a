"""Auxiliary losses of MoE routers, their metrics, and load balancing by a bias.

    loss of the task  +  sum over layers of  [ c_b * balance + c_z * mean over tokens of logsumexp(logits)^2 ]

Like a task's own terms, these are sums with counts, so that the gradient of a step does not depend on how its rows are split
over micro-batches and ranks. This holds for the sequence-wise balance loss (a mean over sequences) and the z-loss (a mean over
tokens). The batch-wise balance loss is a product of means over a micro-batch, weighted by its tokens, and does depend on it.

Only forward passes inside ``recorded`` with gradients enabled are recorded: not the recomputation of a checkpointed block, not
validation, not a frozen reference model.

Shapes: B sequences, T positions, E experts, k experts per token. ``counted`` (B, T) is True for tokens and False for padding,
which contributes to nothing. All results are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from bumblebee.nn.moe import MixtureOfExperts, Router, RouterOutput

BALANCE, Z = "router/balance", "router/z"
Reduce = Callable[[Tensor], Tensor]  # sums a tensor over ranks, in place


# -- losses of one layer -----------------------------------------------------------------------------------------------


def sequence_balance_loss(logits: Tensor, experts: Tensor, counted: Tensor) -> Tensor:
    """Balance loss of each sequence: 1 for an even load, at most E / k in practice.

        sum over e of  f_e P_e       f_e = E / (k T) * number of tokens that selected e
                                     P_e = mean of softmax(logits)_e over the sequence's T tokens

    (DeepSeekMoE, arXiv 2401.06066, equations 12 to 14; DeepSeek-V2, arXiv 2405.04434, equations 23 to 25.) f has no gradient.
    With all tokens of a batch as one sequence and k = 1, it is Switch's loss (arXiv 2101.03961, equations 4 to 6).

    Args:
        logits: (B, T, E) of the router.
        experts: (B, T, k) int64, the selected experts.
        counted: (B, T) bool.

    Returns:
        (B,), zero for a sequence without tokens.
    """
    tokens = counted.sum(1, keepdim=True).clamp(min=1)
    fractions = expert_load(experts, counted, logits.shape[-1]) * logits.shape[-1] / (experts.shape[-1] * tokens)
    probabilities = (logits.softmax(-1) * counted[..., None]).sum(1) / tokens
    return (fractions * probabilities).sum(-1)


def batch_balance_loss(logits: Tensor, experts: Tensor, counted: Tensor) -> Tensor:
    """``sequence_balance_loss`` with all tokens of the batch as one sequence: a scalar."""
    return sequence_balance_loss(logits.flatten(0, 1)[None], experts.flatten(0, 1)[None], counted.flatten()[None])[0]


def z_loss(logits: Tensor, counted: Tensor) -> Tensor:
    """``logsumexp(logits)^2`` of each token (ST-MoE, arXiv 2202.08906, equation 5): (B, T), zero where not counted."""
    return logits.logsumexp(-1).square() * counted


def expert_load(experts: Tensor, counted: Tensor, num_experts: int) -> Tensor:
    """Number of tokens of each sequence that selected each expert: (B, E) in fp32."""
    selected = counted[..., None].expand_as(experts).flatten(1).float()
    return torch.zeros(len(experts), num_experts, device=experts.device).scatter_add_(1, experts.flatten(1), selected)


def entropy(logits: Tensor, counted: Tensor) -> Tensor:
    """Entropy of each token's softmax(logits) in nats: (B, T), zero where not counted."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1) * counted


# -- all layers of a model ---------------------------------------------------------------------------------------------


class RouterLosses:
    """The auxiliary losses of all MoE layers of a model.

    Args:
        layers: the MoE layers, with the same number of experts each.
        balance: "sequence" or "batch".
        balance_weight: c_b above; 0 disables the balance loss.
        z_weight: c_z above; 0 disables the z-loss.
        bias_update_rate: step size of the balancing bias; None or 0 leaves it unchanged.

    Attributes:
        weights: weight of each term in the total loss. The logged value of a term is its mean over layers.
        logged: load of each expert, entropy and tokens since the last log line, on this rank: (layers, E + 2) in fp64, or None.
    """

    def __init__(
        self,
        layers: Sequence[MixtureOfExperts],
        balance: str,
        balance_weight: float,
        z_weight: float,
        bias_update_rate: float | None = None,
    ) -> None:
        self.layers = layers
        self.per_sequence = balance == "sequence"
        self.weights = {name: len(layers) * weight for name, weight in ((BALANCE, balance_weight), (Z, z_weight)) if weight}
        self.bias_update_rate = bias_update_rate or 0.0
        self._step_load: Tensor | None = None  # (layers, E), of the current optimizer step
        self.logged: Tensor | None = None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the router outputs of one training forward pass."""
        for layer in self.layers:
            layer.record = []
        try:
            yield
        finally:
            self._records = [cast(list[RouterOutput], layer.record) for layer in self.layers]
            for layer in self.layers:
                layer.record = None

    def counts(self, counted: Tensor) -> dict[str, Tensor]:
        """Denominator of each term: sequences or tokens, times layers. ``counted``: (B, T) bool."""
        tokens = counted.sum() * len(self.layers)
        sequences = counted.any(1).sum() * len(self.layers)
        denominators = {BALANCE: sequences if self.per_sequence else tokens, Z: tokens}
        return {name: denominators[name] for name in self.weights}

    def losses(self, counted: Tensor) -> dict[str, Tensor]:
        """Sum of each term over the recorded pass; also accumulates the metrics. ``counted``: (B, T) bool, on the device."""
        records, self._records = self._records, []
        assert all(len(record) == 1 for record in records), "exactly one forward pass must be recorded"
        by_layer = [(r.logits.view(*counted.shape, -1), r.experts.view(*counted.shape, -1)) for (r,) in records]
        self._accumulate_metrics(by_layer, counted)
        terms = {BALANCE: self._balance, Z: lambda logits, experts, counted: z_loss(logits, counted).sum()}
        return {name: torch.stack([terms[name](*layer, counted) for layer in by_layer]).sum() for name in self.weights}

    def _balance(self, logits: Tensor, experts: Tensor, counted: Tensor) -> Tensor:
        if self.per_sequence:
            return sequence_balance_loss(logits, experts, counted).sum()
        return batch_balance_loss(logits, experts, counted) * counted.sum()

    @torch.no_grad()
    def _accumulate_metrics(self, by_layer: list[tuple[Tensor, Tensor]], counted: Tensor) -> None:
        rows = []
        for logits, experts in by_layer:
            load = expert_load(experts.flatten(0, 1)[None], counted.flatten()[None], logits.shape[-1])[0]
            rows.append(torch.cat([load, entropy(logits, counted).sum()[None], counted.sum()[None]]))
        sums = torch.stack(rows).double()  # exact for counts, however many steps are added
        self.logged = sums if self.logged is None else self.logged + sums
        if self.bias_update_rate:
            self._step_load = sums[:, :-2] if self._step_load is None else self._step_load + sums[:, :-2]

    @torch.no_grad()
    def after_step(self, reduce: Reduce) -> None:
        """Update the balancing biases, once per optimizer step. Collective.

        b_e += u sign(mean load - load_e) (arXiv 2408.15664, algorithm 1), with the load over all micro-batches and ranks. The
        bias of a frozen router is not updated.
        """
        if self._step_load is None:
            return
        step_load, self._step_load = reduce(self._step_load), None
        for layer, load in zip(self.layers, step_load, strict=True):
            router = cast(Router, layer.gate)
            if router.weight.requires_grad and router.e_score_correction_bias is not None:
                router.e_score_correction_bias += self.bias_update_rate * (load.mean() - load).sign().float()

    def metrics(self, reduce: Reduce) -> dict[str, float]:
        """Metrics since the last call, over all steps, micro-batches and ranks; empty if nothing was recorded. Collective.

        ``router/load``: load of the busiest expert over the mean load, averaged over layers; 1 is even, E / k means that all
        tokens select the same experts. ``router/load_worst``: the maximum over layers. ``router/entropy``: entropy of a token's
        probabilities in nats, averaged over tokens and layers; log E is uniform.
        """
        if self.logged is None:
            return {}
        logged, self.logged = reduce(self.logged), None
        load, entropies, tokens = logged[:, :-2], logged[:, -2], logged[:, -1].clamp(min=1)
        busiest = load.amax(1) / load.mean(1).clamp(min=1e-9)
        return {
            "router/load": busiest.mean().item(),
            "router/load_worst": busiest.amax().item(),
            "router/entropy": (entropies / tokens).mean().item(),
        }
