"""PreferenceTask: what the losses on pairs of responses share: counts, the SFT term, metrics.

Rows 2i and 2i + 1 of a batch are the chosen and the rejected response of pair i; both share one forward pass. The loss is a
mean over pairs, and that of the SFT term a mean over the chosen responses' tokens, over all micro-batches and ranks of a step.
Shapes: P pairs, T positions; (P, 2) is chosen and rejected.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bumblebee.datamodule import Batch, DataModule
from bumblebee.plotting.panels import Panel, ShownMetric
from bumblebee.tasks.pair_log_probs import response_lengths, response_log_probs, token_log_probs, valid_pairs
from bumblebee.tasks.task import ForwardFn, Task
from bumblebee.tasks.tokenizer_checks import adopt_tokenizer, check_length, check_predicts_tokens
from bumblebee.tasks.validation_sums import means_of, with_counts

REWARD_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
PANELS = (
    Panel(ShownMetric("loss", "loss")),
    Panel(
        ShownMetric("rewards/accuracies", "accuracy", axis="reward accuracy", fraction=True),
        ShownMetric("rewards/margins", "margin", axis="reward margin"),
    ),
)
HEADLINE = (ShownMetric("loss", "loss"), ShownMetric("rewards/accuracies", "accuracy", fraction=True))
_METRICS = (*REWARD_METRICS, "logps/chosen", "logps/rejected", "logps/accuracies")


class PreferenceTask(Task):
    """A loss on pairs of responses.

    Batches hold ``input_ids``, ``labels`` (already shifted; -100 is ignored) and ``position_ids``, each (2P, T) int64.
    A subclass assigns ``model`` and ``transforms``, and calls ``_set_weights``.

    Attributes:
        term: name of the loss of a pair, and of the number of pairs.
        metric_names: of what is averaged over pairs and logged.
        sft_weight: weight of a language-modelling loss on the chosen responses; 0 turns it off.
    """

    term: ClassVar[str]
    metric_names: ClassVar[tuple[str, ...]] = _METRICS
    sft_weight: float
    panels, headline = PANELS, HEADLINE

    def _set_weights(self, sft_weight: float) -> None:
        if not sft_weight >= 0:
            raise ValueError(f"sft_weight must be at least 0, got {sft_weight}")
        self.sft_weight = sft_weight
        self.weights = {self.term: 1.0, **({"sft": sft_weight} if sft_weight else {})}
        self.units = dict.fromkeys(self.metric_names, self.term)

    def setup(self, data: DataModule) -> None:
        """Check that the data holds pairs that fit the model."""
        self._check_model()
        check_length(self.model, data)
        if data.tokenizer is not None:
            adopt_tokenizer(self.model, data.tokenizer, data.stop_ids)
        for samples in filter(None, (data.train, data.validation)):
            self._check_pairs(data, data.collate([samples[0]]))

    def _check_model(self) -> None:
        """Check the kind of model.

        Raises:
            ValueError: it is a reward model.
        """
        check_predicts_tokens(self.model)

    def _check_pairs(self, data: DataModule, batch: Batch) -> None:
        if len(batch["labels"]) != 2 or "desirable" in batch:  # labelled answers, for KTO, have two rows each as well
            name = type(data).__name__
            raise ValueError(
                f"data: {type(self).__name__} needs pairs of responses, as from datamodules.Preferences; {name} has none"
            )

    def counts(self, batch: Batch) -> dict[str, int | Tensor]:
        """Number of valid pairs, of chosen tokens if there is an SFT term, and of tokens of both responses."""
        tokens = response_lengths(batch)[valid_pairs(batch)]
        sft = {"sft": tokens[:, 0].sum()} if self.sft_weight else {}
        return {self.term: len(tokens), **sft, "tokens": tokens.sum()}

    def tokens(self, counts: dict[str, float]) -> int:
        """Number of tokens of both responses."""
        return int(counts["tokens"])

    def training_step(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        """Sums of losses and metrics over pairs, and of the chosen tokens' losses."""
        return self._step(model, batch, "train")

    def validation_step(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        """The sums of ``training_step``, and the counts to divide them by."""
        return with_counts(self._step(model, batch, "validation"), self.counts(batch))

    def validation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """The same loss and metrics as in training."""
        names = (*self.weights, *self.metric_names)
        means = means_of(sums, {name: self.units.get(name, name) for name in names})
        loss = sum(weight * means[name] for name, weight in self.weights.items())
        return {"validation_loss": loss, **{f"validation_{name}": means[name] for name in self.metric_names}}

    @abstractmethod
    def _step(self, model: ForwardFn, batch: Batch, split: str) -> dict[str, Tensor]:
        """``_sums`` of a batch."""

    def _sums(self, tokens: Tensor, losses: Tensor, rewards: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Sums of the losses and metrics.

        ``rewards/accuracies`` counts the pairs whose chosen response has the larger reward, ``logps/accuracies`` those whose
        chosen response is more probable.

        Args:
            tokens: log-probability of each target (2P, T).
            losses: of each pair (P,), 0 for invalid ones.
            rewards: of each response (P, 2).
            valid: which pairs count (P,) bool.
        """
        terms = {self.term: losses.sum()}
        log_probs = response_log_probs(tokens)
        if self.sft_weight:
            terms["sft"] = -torch.where(valid, log_probs[:, 0], 0.0).sum()
        columns = [column for each in (rewards, log_probs) for column in compared(each, valid)]
        del columns[6]  # the difference of log-probabilities
        return {**terms, **{name: column.sum() for name, column in zip(_METRICS, columns, strict=True)}}


class ReferenceFreeTask(PreferenceTask):
    """A loss of two responses' log-probabilities that needs no reference model.

    Attributes:
        averaged: whether a response's score is the mean of its tokens' log-probabilities, instead of their sum.
        beta: the reward of a response is beta times its score.
    """

    averaged: ClassVar[bool]
    beta: float

    @abstractmethod
    def pair_loss(self, scores: Tensor) -> Tensor:
        """Loss of each pair: scores (P, 2) fp32 -> (P,)."""

    def _step(self, model: ForwardFn, batch: Batch, split: str) -> dict[str, Tensor]:
        tokens, valid = token_log_probs(model, batch), valid_pairs(batch)
        scores = response_log_probs(tokens)
        if self.averaged:
            scores = scores / response_lengths(batch).clamp(min=1)
        # where() inside and outside: an invalid pair must not contribute to the gradient, not even NaN.
        losses = torch.where(valid, self.pair_loss(torch.where(valid[:, None], scores, -1.0)), 0.0)
        return self._sums(tokens, losses, self.beta * scores, valid)


def compared(values: Tensor, valid: Tensor) -> list[Tensor]:
    """Chosen, rejected, their difference, and whether the chosen one is larger: (P, 2) -> four times (P,) float64.

    Invalid pairs are 0.
    """
    values = torch.where(valid[:, None], values.detach().double(), 0.0)
    margins = values[:, 0] - values[:, 1]
    return [*values.T, margins, (margins > 0).double()]


def smoothed_loss(margins: Tensor, smoothing: float) -> Tensor:
    """-(1 - smoothing) log sigmoid(margin) - smoothing log sigmoid(-margin), for each margin."""
    return -(1 - smoothing) * logsigmoid(margins) - smoothing * logsigmoid(-margins)


def check_beta(beta: float) -> None:
    """Check beta.

    Raises:
        ValueError: it is not positive.
    """
    if not beta > 0:
        raise ValueError(f"pref_beta must be more than 0, got {beta}")


def check_numbers(beta: float, smoothing: float) -> None:
    """Check the options of a loss without a reference.

    Raises:
        ValueError: beta is not positive, or the smoothing not in [0, 0.5).
    """
    check_beta(beta)
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {smoothing}")
