"""KTO: Kahneman-Tversky optimization, from single answers that are good or bad (arXiv 2402.01306).

With h = log p(y | x) - log p_reference(y | x), the sum over the answer's tokens, the loss of an example is

    kto                  desirable     w_D [1 - sigmoid(beta (h - z0))]        equations 6 and 7
                         undesirable   w_U [1 - sigmoid(beta (z0 - h))]
    apo_zero_unpaired    desirable     w_D [1 - sigmoid(beta h)]               arXiv 2408.06266, without pairs
                         undesirable   w_U sigmoid(beta h)

and that of a step the mean over its examples. z0 estimates the divergence between policy and reference,

    z0 = max(0, mean of h over the step's prompts with the answers of other examples),

without a gradient. It is computed before the first backward pass, from all micro-batches and ranks of the step, so it depends
on neither. In a validation it is that of all held-out examples.
Shapes: N examples, T positions. Rows 2i and 2i + 1 of the DataModule's batches are prompt i with its answer and with another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from bumblebee.datamodule import Batch, DataModule
from bumblebee.distributed import process_group
from bumblebee.nn import IGNORE_INDEX
from bumblebee.tasks.pair_log_probs import token_log_probs, valid_pairs
from bumblebee.tasks.preference_task import HEADLINE, PANELS, check_beta
from bumblebee.tasks.reference import evaluation_mode
from bumblebee.tasks.referenced_task import ReferencedTask
from bumblebee.tasks.run_context import RunContext
from bumblebee.tasks.task import ForwardFn
from bumblebee.tasks.tokenizer_checks import adopt_tokenizer, check_length, check_predicts_tokens
from bumblebee.tasks.validation_sums import means_of, with_counts
from bumblebee.transforms import apply_transforms

_ROWS = ("input_ids", "labels", "position_ids")
_UNITS = {
    "rewards/chosen": "desirable", "logps/chosen": "desirable", "rewards/rejected": "undesirable",
    "logps/rejected": "undesirable", "rewards/accuracies": "kto", "kl": "kto",
}  # fmt: skip


class KTO(ReferencedTask):
    """Kahneman-Tversky optimization.

    Batches are those of ``datamodules.UnpairedPreferences``.

    Args:
        model: called as ``model(input_ids, position_ids=..., labels=...)``, returns token losses (N, T).
        transforms: applied to the model in order, such as bumblebee.lora.LoRA.
        pref_beta: beta of the loss; larger values keep the model closer to the reference.
        loss_type: kto or apo_zero_unpaired.
        desirable_weight: w_D. The paper keeps desirable_weight times the number of desirable examples between 1 and 4/3 of
            the same product for undesirable ones.
        undesirable_weight: w_U.
        reference: adapters_off (the model without its adapters), copy (the initial model), the folder of another model, or
            auto: adapters_off if the model has adapters, else copy.
        precompute_reference: compute the reference's log-probabilities once, before training, and cache them on disk.
        cache_dir: folder of that cache; by default $BUMBLEBEE_CACHE or ~/.cache/bumblebee.

    Raises:
        ValueError: a number out of range, or a reference folder that does not exist.
    """

    units = _UNITS
    panels, headline = PANELS, HEADLINE

    def __init__(
        self,
        model: nn.Module,
        transforms: list[Callable[[nn.Module], object]] | None = None,
        pref_beta: float = 0.1,
        loss_type: Literal["kto", "apo_zero_unpaired"] = "kto",
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        reference: str = "auto",
        precompute_reference: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        check_beta(pref_beta)
        if loss_type not in ("kto", "apo_zero_unpaired"):
            raise ValueError(f"loss_type must be kto or apo_zero_unpaired, got {loss_type!r}")
        for name, weight in {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}.items():
            if not weight >= 0:
                raise ValueError(f"{name} must be at least 0, got {weight}")
        self.model, self.transforms = model, apply_transforms(model, transforms)
        self.pref_beta, self.loss_type = pref_beta, loss_type
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight
        self.weights = {"kto": 1.0}
        self._set_reference(reference, precompute_reference, cache_dir)
        self._run: RunContext | None = None
        self._held_out_z0: Tensor | None = None  # with the current weights

    # -- preparation ---------------------------------------------------------------------------------------------------

    def setup(self, data: DataModule) -> None:
        """Check that the data holds answers with labels that fit the model, and choose the reference."""
        check_predicts_tokens(self.model)
        check_length(self.model, data)
        if data.tokenizer is not None:
            adopt_tokenizer(self.model, data.tokenizer, data.stop_ids)
        for samples in filter(None, (data.train, data.validation)):
            batch = data.collate([samples[0]])
            if "desirable" not in batch or len(batch["labels"]) != 2:
                name = type(data).__name__
                raise ValueError(f"data: KTO needs labelled answers, as from datamodules.UnpairedPreferences; {name} has none")
        self._data = data
        super().setup(data)

    def begin(self, run: RunContext, /) -> None:
        """Prepare the reference, see the base class."""
        self._run = run
        super().begin(run)

    def summary(self) -> dict[str, object]:
        """The loss, the weights in use, and the reference."""
        weights = {name: getattr(self, name) for name in ("desirable_weight", "undesirable_weight")}
        in_use = {name: weight for name, weight in weights.items() if weight != 1}
        return {"loss": self.loss_type, "beta": self.pref_beta, **in_use, "reference": self.describe_reference()}

    # -- z0 and the reference, before a step ---------------------------------------------------------------------------

    def prepare_windows(self, windows: list[list[Batch]], step: int, /) -> list[list[Batch]]:
        """Keep the rows with the examples' own answers; add the reference's log-probabilities and z0. Collective."""
        return [self._prepare(window) for window in windows]

    def _prepare(self, window: list[Batch]) -> list[Batch]:
        assert self._run is not None, "begin has not been called"
        self._held_out_z0 = None
        engine = self._run.engine
        on_device = [self._run.to_device(batch) for batch in window]
        references = [self._reference(engine, batch, "train") for batch in on_device]
        z0 = self._z0(engine, zip(on_device, references, strict=True)).cpu()
        return [
            {**_own(batch), "reference": reference[:, 0].cpu(), "z0": z0}
            for batch, reference in zip(window, references, strict=True)
        ]

    def largest_batch(self, batch: Batch, /) -> Batch:
        """The rows with the examples' own answers."""
        return {**_own(batch), "reference": torch.zeros(len(batch["desirable"])), "z0": torch.zeros(1)}

    def _reference(self, model: ForwardFn, batch: Batch, split: str) -> Tensor:
        """The reference's log-probability of both answers of each example: (N, 2)."""
        assert self.reference_model is not None, "begin has not been called"
        return self.reference_model(model, batch, split)

    @torch.no_grad()
    def _z0(self, model: ForwardFn, batches: Iterable[tuple[Batch, Tensor]]) -> Tensor:
        """z0 over this and the other ranks' batches, each with its reference: (1,) fp32. Collective."""
        sums: Tensor | None = None
        for batch, reference in batches:
            if self.loss_type == "apo_zero_unpaired":
                return torch.zeros(1, device=reference.device)
            other = {name: batch[name][1::2].contiguous() for name in _ROWS}
            with evaluation_mode(self.model):
                ratios = token_log_probs(model, other).sum(1) - reference[:, 1]
            valid = valid_pairs(batch)
            total = torch.stack([torch.where(valid, ratios.double(), 0.0).sum(), valid.sum().double()])
            sums = total if sums is None else sums + total
        assert sums is not None, "a step has a micro-batch"
        total, count = process_group.all_reduce_sum(sums)
        return (total / count.clamp(min=1)).clamp(min=0).float()[None]

    def _validation_z0(self, model: ForwardFn, device: torch.device) -> Tensor:
        """z0 over all held-out examples, computed once for the current weights. Collective."""
        if self._held_out_z0 is None:
            on_device = (_moved(batch, device) for batch in self._held_out_batches())
            self._held_out_z0 = self._z0(model, ((each, self._reference(model, each, "validation")) for each in on_device))
        return self._held_out_z0

    def _held_out_batches(self) -> Iterator[Batch]:
        samples = self._data.validation or ()
        if self._run is not None:
            yield from self._run.local_batches(samples)
        else:
            yield from (self._data.collate([sample]) for sample in samples)

    # -- a step --------------------------------------------------------------------------------------------------------

    def counts(self, batch: Batch) -> dict[str, int | Tensor]:
        """Numbers of examples, of desirable and undesirable ones, and of tokens of their answers."""
        valid, desirable = _valid(batch), batch["desirable"]
        examples = {"desirable": (valid & desirable).sum(), "undesirable": (valid & ~desirable).sum()}
        return {"kto": valid.sum(), **examples, "tokens": (batch["labels"] != IGNORE_INDEX).sum()}

    def tokens(self, counts: dict[str, float]) -> int:
        """Number of tokens of the answers."""
        return int(counts["tokens"])

    def training_step(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        """Sums of losses and metrics over examples."""
        return self._sums(model, batch)

    def validation_step(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        """The sums of ``training_step``, and the counts to divide them by."""
        z0 = self._validation_z0(model, batch["labels"].device)
        own = {**_own(batch), "reference": self._reference(model, batch, "validation")[:, 0], "z0": z0}
        return with_counts(self._sums(model, own), self.counts(own))

    def validation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """The same loss and metrics as in training."""
        means = means_of(sums, {"kto": "kto", **_UNITS})
        metrics = {"loss": means.pop("kto"), **means, **self.derived_metrics(means)}
        return {f"validation_{name}": value for name, value in metrics.items()}

    def derived_metrics(self, means: Mapping[str, float], /) -> dict[str, float]:
        """The difference between the mean rewards of desirable and undesirable answers."""
        if "rewards/chosen" not in means or "rewards/rejected" not in means:
            return {}
        return {"rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}

    def _sums(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        log_probs, valid, desirable, z0 = token_log_probs(model, batch).sum(1), _valid(batch), batch["desirable"], batch["z0"]
        # where() inside and outside: an example without targets must not contribute to the gradient, not even NaN.
        ratios = torch.where(valid, log_probs - batch["reference"], 0.0)
        losses = torch.where(valid, self._losses(ratios, desirable, z0), 0.0)
        rewards, log_probs = self.pref_beta * ratios.detach().double(), log_probs.detach().double()
        good, bad = valid & desirable, valid & ~desirable
        correct = torch.where(desirable, rewards > self.pref_beta * z0, rewards < self.pref_beta * z0) & valid
        return {
            "kto": losses.sum(),
            "rewards/chosen": rewards[good].sum(),
            "logps/chosen": log_probs[good].sum(),
            "rewards/rejected": rewards[bad].sum(),
            "logps/rejected": log_probs[bad].sum(),
            "rewards/accuracies": correct.double().sum(),
            "kl": z0.double().sum() * valid.sum(),
        }

    def _losses(self, ratios: Tensor, desirable: Tensor, z0: Tensor) -> Tensor:
        """Loss of each example: (N,) fp32, (N,) bool, (1,) -> (N,)."""
        signs = torch.where(desirable, 1.0, -1.0)
        weights = torch.where(desirable, self.desirable_weight, self.undesirable_weight)
        return weights * (1 - torch.sigmoid(self.pref_beta * signs * (ratios - z0)))


def _own(batch: Batch) -> Batch:
    """The rows with the examples' own answers, and the labels."""
    return {**{name: batch[name][::2].contiguous() for name in _ROWS}, "desirable": batch["desirable"]}


def _valid(batch: Batch) -> Tensor:
    """Which rows have targets: (rows,) bool."""
    return (batch["labels"] != IGNORE_INDEX).any(1)


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}
