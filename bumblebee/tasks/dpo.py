"""DPO: learn which of two responses people prefer (arXiv 2305.18290).

With the implicit reward margin of a pair

    h = [log p(chosen) - log p_reference(chosen)] - [log p(rejected) - log p_reference(rejected)]

the loss of the pair is one of

    sigmoid     -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)     eps: dpo_label_smoothing (arXiv 2305.18290)
    ipo         (h - 1 / (2 beta))^2                                          arXiv 2310.12036, equation 17
    hinge       max(0, 1 - beta h)                                            arXiv 2305.10425

log p is the sum over the response's tokens, or their mean with ``length_normalised``. The unit of the loss is the pair: a step
divides by the number of pairs over micro-batches and ranks. Chosen and rejected rows go through one forward pass.
Shapes: P pairs, T positions; (P, 2) is chosen and rejected.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from bumblebee.datamodule import Batch, DataModule
from bumblebee.lora import adapters_off, has_adapters
from bumblebee.model import Bumblebee
from bumblebee.tasks.pair_log_probs import discounted_sums, lengths, response_log_probabilities, sums, trained_pairs
from bumblebee.tasks.reference import Frozen, Policy, Reference
from bumblebee.tasks.task import Task
from bumblebee.tasks.tokenizer_checks import adopt_tokenizer, check_length

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer

_KINDS = ("auto", "adapters_off", "copy")
_METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected", "logps/accuracies",
)  # fmt: skip


class DPO(Task):
    """Direct preference optimisation.

    Batches hold ``input_ids``, ``labels`` (already shifted; -100 is no target) and ``position_ids``, each (2P, T) int64, and
    ``index`` (P,). Rows 2i and 2i + 1 are the chosen and the rejected response of pair i, whose number in the data is index[i].

    Args:
        model: called as ``model(input_ids, position_ids=..., labels=...)``, returns token losses (2P, T).
        transforms: called with the model one after the other, such as bumblebee.lora.LoRA.
        pref_beta: how strongly the model is held to the reference; in the loss as beta.
        loss_type: sigmoid, ipo or hinge.
        dpo_label_smoothing: share of the pairs whose preference is taken to be wrong; with sigmoid only.
        length_normalised: mean instead of sum over a response's tokens in the loss, as the authors of IPO do in practice.
        sft_weight: weight of the mean loss of the chosen responses' tokens, as in language modelling; 0 is without.
        ld_alpha: how much the policy's log-probabilities count beyond the shorter response's length, 1 being as all others.
        reference: adapters_off (the model without its adapters), copy (the model as it was at first), the folder of another
            model, or auto: adapters_off where there are adapters, copy elsewhere.
        precompute_reference: compute the reference's log-probabilities once, before training, and keep them on the disk.
        cache_dir: where they are kept; by default $BUMBLEBEE_CACHE or ~/.cache/bumblebee.

    Raises:
        ValueError: a number out of its range, or a reference that is not there.
    """

    def __init__(
        self,
        model: nn.Module,
        transforms: list[Callable[[nn.Module], Any]] | None = None,
        pref_beta: float = 0.1,
        loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid",
        dpo_label_smoothing: float = 0.0,
        length_normalised: bool = False,
        sft_weight: float = 0.0,
        ld_alpha: float = 1.0,
        reference: str = "auto",
        precompute_reference: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        _check(pref_beta, loss_type, dpo_label_smoothing, sft_weight, ld_alpha, reference)
        self.model = model
        for transform in transforms or []:
            transform(model)
        self.pref_beta, self.dpo_label_smoothing = pref_beta, dpo_label_smoothing
        self.loss_type, self.length_normalised = loss_type, length_normalised
        self.sft_weight, self.ld_alpha = sft_weight, ld_alpha
        self.reference, self.precompute_reference, self.cache_dir = reference, precompute_reference, cache_dir
        self.pair_loss = {"sigmoid": self._sigmoid, "ipo": self._ipo, "hinge": self._hinge}[loss_type]
        self.weights = {"dpo": 1.0, **({"sft": sft_weight} if sft_weight else {})}
        self.units = dict.fromkeys(_METRICS, "dpo")
        self._copy: nn.Module | None = None
        self.compared_with: Reference | None = None

    # -- the reference -------------------------------------------------------------------------------------------------

    def setup(self, data: DataModule) -> None:
        """Check that the data are pairs that fit the model, and copy the model while it is untouched."""
        check_length(self.model, data)
        if data.tokenizer is not None:
            adopt_tokenizer(self.model, data.tokenizer, data.stop_ids)
        for samples in filter(None, (data.train, data.validation)):
            self._check_pairs(data, data.collate([samples[0]]))
        adapters = has_adapters(self.model)
        if self.reference == "auto":
            self.reference = "adapters_off" if adapters else "copy"
        if self.reference == "adapters_off" and not adapters:
            raise ValueError("reference: adapters_off needs adapters: add bumblebee.lora.LoRA to task.transforms, or take copy")
        if self.reference == "copy" and not self.precompute_reference:
            self._copy = copy.deepcopy(self.model)  # now: an engine's hooks would be copied with it

    def _check_pairs(self, data: DataModule, batch: Batch) -> None:
        kind = type(data).__name__
        if len(batch["labels"]) != 2:
            raise ValueError(f"data: DPO needs pairs of responses, such as datamodules.Preferences gives; {kind} gives none")
        if self.precompute_reference and "index" not in batch:
            raise ValueError(f"precompute_reference needs pairs that are numbered, and the batches of {kind} have no index")

    def begin(self, trainer: Trainer) -> None:
        """Make the reference, or its numbers."""
        if not self.precompute_reference:
            self.compared_with = self._live_reference(trainer)
            return
        from bumblebee.tasks.reference_cache import precomputed

        weights = self._reference_digest(trainer)
        self.compared_with = precomputed(lambda: self._live_reference(trainer), weights, trainer, self.cache_dir)

    def begin_validation(self, device: torch.device) -> None:
        """Read the reference from its folder: a trained model does not know what it was."""
        if self.reference in _KINDS:
            raise ValueError(f"reference: {self.reference} is of a run: to validate, name the folder of the model at its start")
        model = self._model_class().from_pretrained(self.reference, device=device)
        self.compared_with = Frozen(model.eval().requires_grad_(False))

    def models_beside(self) -> list[nn.Module]:
        """The copy, or the other model. Precomputed, it is gone when training begins."""
        if self.precompute_reference or self.reference == "adapters_off":
            return []
        return [self._copy or self._model_class().from_pretrained(self.reference)]

    def _live_reference(self, trainer: Trainer) -> Reference:
        if self.reference == "adapters_off":
            return Policy(self.model, adapters_off)
        if self.reference == "copy" and self._copy is None:
            return Policy(self.model, nullcontext)  # nothing is trained yet
        model, self._copy = self._copy or self._load_reference(trainer), None
        return Frozen(trainer.frozen(model))

    def _load_reference(self, trainer: Trainer) -> nn.Module:
        dtype = trainer.engine.options.weights_dtype
        with trainer.building():
            model = self._model_class().from_pretrained(self.reference, dtype=dtype, device=trainer.device)
        tokenizer = trainer.data.tokenizer
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"reference: the tokenizer has {tokenizer.vocab_size} ids, the model in {self.reference}"
                f" a vocab_size of {model.config.vocab_size}"
            )
        return model

    def _model_class(self) -> type[Bumblebee]:
        return type(self.model) if isinstance(self.model, Bumblebee) else Bumblebee

    def _reference_digest(self, trainer: Trainer) -> str:
        from bumblebee.tasks.reference_cache import folder_digest, tensors_digest

        if self.reference not in _KINDS:
            return folder_digest(self.reference)
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        left_out = trained if self.reference == "adapters_off" else set()  # adapters have no part in it
        tensors = trainer.engine.full_tensors(lambda name: name not in left_out)
        return tensors_digest(tensors, getattr(self.model, "config", None))

    def summary(self) -> dict[str, Any]:
        """The loss, what is in use beside it, and the reference."""
        computed = ", log-probabilities computed before training" if self.precompute_reference else ""
        words = {"adapters_off": "the model without its adapters", "copy": "the model as it was at first"}
        reference = words.get(self.reference, self.reference) + computed
        in_use = {
            "label_smoothing": self.dpo_label_smoothing or None,
            "tokens": "by their mean" if self.length_normalised else None,
            "sft_weight": self.sft_weight or None,
            "ld_alpha": self.ld_alpha if self.ld_alpha < 1 else None,
        }
        return {"loss": self.loss_type, "beta": self.pref_beta, **in_use, "reference": reference}

    # -- a step --------------------------------------------------------------------------------------------------------

    def counts(self, batch: Batch) -> dict[str, int | Tensor]:
        """Pairs with targets on both sides, their chosen tokens where these are trained on, and the tokens of both."""
        tokens = lengths(batch)[trained_pairs(batch)]
        sft = {"sft": tokens[:, 0].sum()} if self.sft_weight else {}
        return {"dpo": len(tokens), **sft, "tokens": tokens.sum()}

    def tokens(self, counts: dict[str, float]) -> int:
        """The tokens of both responses."""
        return int(counts["tokens"])

    def training_step(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """Sums over the pairs of loss and metrics, and the sum of the chosen tokens' losses."""
        return self._step(model, batch, "train")

    def validation_step(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """What ``training_step`` gives, and what to divide by."""
        counts = {f"{name} count": torch.as_tensor(count) for name, count in self.counts(batch).items()}
        return {**{name: value.double() for name, value in self._step(model, batch, "validation").items()}, **counts}

    def validation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """The same loss and means as in training."""
        means = {name: sums[name] / max(sums[f"{self.units.get(name, name)} count"], 1) for name in (*self.weights, *_METRICS)}
        loss = sum(weight * means[name] for name, weight in self.weights.items())
        return {"validation_loss": loss, **{f"validation_{name}": means[name] for name in _METRICS}}

    def _step(self, model: Any, batch: Batch, samples: str) -> dict[str, Tensor]:
        assert self.compared_with is not None, "begin has not been called"
        reference = self.compared_with(model, batch, samples)
        tokens = response_log_probabilities(model, batch)
        counted = trained_pairs(batch)
        margins = self._margins(tokens, reference, batch)
        # Inside and outside: a pair that does not count must have no part in the gradient, whatever its numbers are.
        losses = torch.where(counted, self.pair_loss(torch.where(counted, margins, 0.0)), 0.0)
        terms = {"dpo": losses.sum()}
        if self.sft_weight:
            terms["sft"] = -torch.where(counted, sums(tokens)[:, 0], 0.0).sum()
        return {**terms, **self._metrics(sums(tokens.detach()), reference, counted)}

    def _margins(self, tokens: Tensor, reference: Tensor, batch: Batch) -> Tensor:
        """(2P, T) and (P, 2) -> the h of each pair: (P,)."""
        policy = sums(tokens) if self.ld_alpha == 1 else discounted_sums(tokens, batch, self.ld_alpha)
        ratios = policy - reference
        if self.length_normalised:
            ratios = ratios / lengths(batch).clamp(min=1)
        return ratios[:, 0] - ratios[:, 1]

    def _metrics(self, policy: Tensor, reference: Tensor, counted: Tensor) -> dict[str, Tensor]:
        """Sums over pairs. Rewards are the implicit ones, beta (log p - log p_reference), of whole responses for any loss.

        Accuracies are the pairs whose chosen response has the larger reward, and those where it is the more probable one.
        """
        policy, reference = (torch.where(counted[:, None], side.double(), 0.0) for side in (policy, reference))
        rewards = self.pref_beta * (policy - reference)
        margins = rewards[:, 0] - rewards[:, 1]
        more_probable = (policy[:, 0] > policy[:, 1]).double()
        columns = [*rewards.T, margins, (margins > 0).double(), *policy.T, more_probable]
        return {name: column.sum() for name, column in zip(_METRICS, columns, strict=True)}

    # -- losses of pairs, from their margins h -------------------------------------------------------------------------

    def _sigmoid(self, h: Tensor) -> Tensor:
        eps, scaled = self.dpo_label_smoothing, self.pref_beta * h
        return -(1 - eps) * logsigmoid(scaled) - eps * logsigmoid(-scaled)

    def _ipo(self, h: Tensor) -> Tensor:
        return (h - 1 / (2 * self.pref_beta)) ** 2

    def _hinge(self, h: Tensor) -> Tensor:
        return torch.relu(1 - self.pref_beta * h)


def _check(beta: float, loss_type: str, smoothing: float, sft_weight: float, ld_alpha: float, reference: str) -> None:
    if not beta > 0:
        raise ValueError(f"pref_beta must be more than 0, got {beta}")
    if loss_type not in ("sigmoid", "ipo", "hinge"):
        raise ValueError(f"loss_type must be sigmoid, ipo or hinge, got {loss_type!r}")
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"dpo_label_smoothing must be in [0, 0.5), got {smoothing}")
    if smoothing and loss_type != "sigmoid":
        raise ValueError(f"dpo_label_smoothing belongs to loss_type sigmoid, not to {loss_type}; got {smoothing}")
    if not sft_weight >= 0:
        raise ValueError(f"sft_weight must not be negative, got {sft_weight}")
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha must be in [0, 1], got {ld_alpha}")
    if reference not in _KINDS and not Path(reference).is_dir():
        raise ValueError(f"reference must be auto, adapters_off, copy or a model folder; there is no folder {reference!r}")
