"""Reward models: a scalar score of a response, trained on pairs (arXiv 2203.02155, equation 1).

With the Bradley-Terry model of preferences, the loss of a pair with the scores r of both responses is

    -log sigmoid(r_chosen - r_rejected - m) + c (r_chosen + r_rejected)^2

m is the pair's ``margin`` in the data, by which the chosen response is better (arXiv 2307.09288, equation 2), or 0. The second
term keeps scores around zero (arXiv 2312.09244, section 3): pairs alone do not determine a common offset.

The score is that of the token that ends the response, which the model reads after the prompt and the whole response.
Shapes: P pairs, T positions; (P, 2) is chosen and rejected.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad

from bumblebee.datamodule import Batch, DataModule
from bumblebee.model import Bumblebee
from bumblebee.nn import IGNORE_INDEX
from bumblebee.tasks.pair_log_probs import valid_pairs
from bumblebee.tasks.preference_task import REWARD_METRICS, PreferenceTask, compared
from bumblebee.tasks.task import ForwardFn
from bumblebee.transforms import apply_transforms


class RewardModel(PreferenceTask):
    """Training of a reward model.

    The language-modeling head is replaced by a new one that scores a text. Model folders of the run are those of transformers'
    ``ForSequenceClassification`` classes with one label; adapters are saved with the head, as PEFT's for such models.

    Args:
        model: a Bumblebee: a language model, or a reward model to continue with.
        transforms: applied to the model in order, such as bumblebee.lora.LoRA.
        center_rewards_coefficient: weight c of the squared sum of a pair's scores; 0 turns it off.

    Raises:
        ValueError: a number out of range, or a model of another kind.
    """

    term, metric_names = "reward_model", REWARD_METRICS

    def __init__(
        self,
        model: nn.Module,
        transforms: list[Callable[[nn.Module], object]] | None = None,
        center_rewards_coefficient: float = 0.0,
    ) -> None:
        if not center_rewards_coefficient >= 0:
            raise ValueError(f"center_rewards_coefficient must be at least 0, got {center_rewards_coefficient}")
        if not isinstance(model, Bumblebee):
            raise ValueError(f"model must be a bumblebee.Bumblebee, whose head can be replaced, not a {type(model).__name__}")
        model.become_reward_model()
        self.model, self.transforms = model, apply_transforms(model, transforms)
        self.center_rewards_coefficient = center_rewards_coefficient
        self._set_weights(sft_weight=0.0)

    def setup(self, data: DataModule) -> None:
        """Check that the data holds pairs that fit the model, and choose a padding token that ends no response."""
        super().setup(data)
        tokenizer = data.tokenizer
        if tokenizer is None:
            return
        assert isinstance(self.model, Bumblebee)
        config = self.model.config
        # transformers scores the last token that is not padding.
        ends = {*data.stop_ids, *self._last_tokens(data)}
        candidates = (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, *range(len(ends) + 1))
        config.pad_token_id = next(token for token in candidates if token is not None and token not in ends)

    @staticmethod
    def _last_tokens(data: DataModule) -> list[int]:
        batch = data.collate([data.train[0]])
        return batch["labels"].gather(1, _last_targets(batch["labels"])[:, None]).flatten().tolist()

    def _check_model(self) -> None:
        """Any model works: it has become a reward model."""

    def summary(self) -> dict[str, object]:
        """The loss and the options in use."""
        return {"loss": "Bradley-Terry", "center_rewards_coefficient": self.center_rewards_coefficient or None}

    def _step(self, model: ForwardFn, batch: Batch, split: str) -> dict[str, Tensor]:
        scores, valid = response_scores(model, batch).view(-1, 2), valid_pairs(batch)
        # where() inside and outside: an invalid pair must not contribute to the gradient, not even NaN.
        losses = torch.where(valid, self._pair_loss(torch.where(valid[:, None], scores, 0.0), batch.get("margin")), 0.0)
        columns = zip(REWARD_METRICS, compared(scores, valid), strict=True)
        return {self.term: losses.sum(), **{name: column.sum() for name, column in columns}}

    def _pair_loss(self, scores: Tensor, margin: Tensor | None) -> Tensor:
        """Loss of each pair: (P, 2) -> (P,)."""
        difference = scores[:, 0] - scores[:, 1]
        centered = self.center_rewards_coefficient * scores.sum(dim=1) ** 2
        return centered - logsigmoid(difference if margin is None else difference - margin)


def response_scores(model: ForwardFn, batch: Batch) -> Tensor:
    """Score of each row's last target, which the model reads as well: (2P,) fp32.

    ``input_ids`` end before it, so they get a position more. A row without targets gets a score without a meaning.
    """
    labels = batch["labels"]
    rows, last = torch.arange(len(labels), device=labels.device), _last_targets(labels)
    input_ids, position_ids = pad(batch["input_ids"], (0, 1)), pad(batch["position_ids"], (0, 1))
    input_ids[:, -1] = input_ids[:, -2]
    position_ids[:, -1] = position_ids[:, -2]
    input_ids[rows, last + 1] = labels[rows, last].clamp(min=0)
    position_ids[rows, last + 1] = position_ids[rows, last] + 1
    flat = rows * input_ids.shape[1] + last + 1
    return model(input_ids, position_ids=position_ids, logits_at=flat).flatten()


def _last_targets(labels: Tensor) -> Tensor:
    """Position of each row's last target; 0 for a row without: (B, T) -> (B,)."""
    positions = torch.arange(labels.shape[1], device=labels.device)
    return torch.where(labels != IGNORE_INDEX, positions, 0).amax(dim=1)
