"""What the routers of a model add to any task's loss, what is logged of them, and the bias that balances without a loss.

    task's loss  +  sum over layers of  [ c_b * balance + c_z * mean over tokens of logsumexp(logits)^2 ]

Terms are sums with counts, like a task's own, so that a step's gradient does not depend on how its rows are cut into
micro-batches and ranks. The mean over sequences of the sequence-wise balance, and the mean over tokens of the z-loss, are such;
the batch-wise balance is not: it is a product of means over a micro-batch, which weighs by its tokens.

A forward pass is recorded inside ``recorded`` and where gradients are taken, nowhere else: not when a block is computed again
in the backward pass, not in validation, not for a frozen reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from bumblebee.nn.balance_losses import batch_balance, entropy, loads, sequence_balance, z_loss
from bumblebee.nn.moe import MixtureOfExperts, Routed, Router

BALANCE, Z = "router/balance", "router/z"
Reduce = Callable[[Tensor], Tensor]  # the sum over ranks, in place


class RouterLosses:
    """The auxiliary losses of a mixture of experts.

    Args:
        layers: all of a model's, of the same number of experts.
        balance: "sequence" or "batch", see ``balance.py``.
        balance_weight: c_b above; 0 for none.
        z_weight: c_z above; 0 for none.
        bias_update_rate: by how much a step moves each bias; None or 0 leaves them.

    Attributes:
        weights: of each term in the total. What is logged of a term is its mean over layers.
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
        self._step_loads: Tensor | None = None  # (layers, E) of the step that is being made
        self._logged: Tensor | None = None  # (layers, E + 2) since the last line: loads, entropies, tokens

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside, one forward pass that is trained on is recorded."""
        for layer in self.layers:
            layer.record = []
        try:
            yield
        finally:
            self._records = [cast(list[Routed], layer.record) for layer in self.layers]
            for layer in self.layers:
                layer.record = None

    def counts(self, counted: Tensor) -> dict[str, Tensor]:
        """What each term is divided by: sequences or tokens, times layers. ``counted``: (B, T) bool, what is a token."""
        tokens = counted.sum() * len(self.layers)
        sequences = counted.any(1).sum() * len(self.layers)
        found = {BALANCE: sequences if self.per_sequence else tokens, Z: tokens}
        return {name: found[name] for name in self.weights}

    def losses(self, counted: Tensor) -> dict[str, Tensor]:
        """The sum of each term over the recorded pass; notes the loads. ``counted``: (B, T) bool, on the device."""
        records, self._records = self._records, []
        assert all(len(record) == 1 for record in records), "one forward pass is recorded at a time"
        by_layer = [(r.logits.view(*counted.shape, -1), r.experts.view(*counted.shape, -1)) for (r,) in records]
        self._note(by_layer, counted)
        of_layer = {BALANCE: self._balance, Z: lambda logits, experts, counted: z_loss(logits, counted).sum()}
        return {name: torch.stack([of_layer[name](*layer, counted) for layer in by_layer]).sum() for name in self.weights}

    def _balance(self, logits: Tensor, experts: Tensor, counted: Tensor) -> Tensor:
        if self.per_sequence:
            return sequence_balance(logits, experts, counted).sum()
        return batch_balance(logits, experts, counted) * counted.sum()

    @torch.no_grad()
    def _note(self, by_layer: list[tuple[Tensor, Tensor]], counted: Tensor) -> None:
        rows = []
        for logits, experts in by_layer:
            load = loads(experts.flatten(0, 1)[None], counted.flatten()[None], logits.shape[-1])[0]
            rows.append(torch.cat([load, entropy(logits, counted).sum()[None], counted.sum()[None]]))
        found = torch.stack(rows).double()  # whole numbers stay whole however many steps are added
        self._logged = found if self._logged is None else self._logged + found
        if self.bias_update_rate:
            self._step_loads = found[:, :-2] if self._step_loads is None else self._step_loads + found[:, :-2]

    @torch.no_grad()
    def after_step(self, reduce: Reduce) -> None:
        """Move the bias of experts with less load than the mean up, of those with more down, once a step. Collective.

        b_e += u sign(mean load - load_e) (arXiv 2408.15664, algorithm 1), loads being those of all micro-batches and ranks. The
        bias of a router that is frozen stays.
        """
        if self._step_loads is None:
            return
        step_loads, self._step_loads = reduce(self._step_loads), None
        for layer, load in zip(self.layers, step_loads, strict=True):
            router = cast(Router, layer.gate)
            if router.weight.requires_grad and router.e_score_correction_bias is not None:
                router.e_score_correction_bias += self.bias_update_rate * (load.mean() - load).sign().float()

    def metrics(self, reduce: Reduce) -> dict[str, float]:
        """Since the last call, over all steps, micro-batches and ranks; nothing where nothing was recorded. Collective.

        ``router/load``: tokens of the busiest expert over those of the mean one, the mean of all layers; 1 is even, E / k is
        all tokens at the same experts. ``router/load_worst``: the same of the worst layer. ``router/entropy``: of a token's
        probabilities in nats, the mean of tokens and layers; log E is undecided.
        """
        if self._logged is None:
            return {}
        logged, self._logged = reduce(self._logged), None
        load, entropies, tokens = logged[:, :-2], logged[:, -2], logged[:, -1].clamp(min=1)
        busiest = load.amax(1) / load.mean(1).clamp(min=1e-9)
        return {
            "router/load": busiest.mean().item(),
            "router/load_worst": busiest.amax().item(),
            "router/entropy": (entropies / tokens).mean().item(),
        }
