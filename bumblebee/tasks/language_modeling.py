"""Language modelling: predict the next token. Pretraining and supervised fine-tuning differ only in their labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bumblebee.datamodule import Batch, DataModule
from bumblebee.nn import IGNORE_INDEX
from bumblebee.tasks.task import ForwardFn, Task
from bumblebee.tasks.tokenizer_checks import adopt_tokenizer, check_learnable, check_length, check_predicts_tokens
from bumblebee.transforms import apply_transforms


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats per token. At most e^80, about 5e34, which also fits into float32."""
    return math.exp(min(loss, 80.0))


class LanguageModeling(Task):
    """Next-token cross-entropy.

    Batches hold ``input_ids``, ``labels`` (already shifted; -100 is ignored) and ``position_ids``, each (B, T) int64.

    Args:
        model: called as ``model(input_ids, position_ids=..., labels=...)``, returns token losses (B, T).
        transforms: applied to the model in order, such as bumblebee.transforms.ActivationCheckpointing.
    """

    def __init__(self, model: nn.Module, transforms: list[Callable[[nn.Module], Any]] | None = None) -> None:
        self.model, self.transforms = model, apply_transforms(model, transforms)
        self.weights = {"loss": 1.0}
        self._token_lengths: Tensor | None = None  # (V,) bytes of each token, for bits per byte

    def setup(self, data: DataModule) -> None:
        """Check that the data fits the model, and adopt the tokenizer's special ids."""
        check_predicts_tokens(self.model)
        check_learnable("LanguageModeling", data)
        check_length(self.model, data)
        if data.tokenizer is None:
            return
        adopt_tokenizer(self.model, data.tokenizer, data.stop_ids)
        self._token_lengths = torch.tensor([len(token) for token in data.tokenizer.token_bytes])

    def counts(self, batch: Batch) -> dict[str, int | Tensor]:
        """Number of targets."""
        return {"loss": (batch["labels"] != IGNORE_INDEX).sum()}

    def training_step(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        """Sum of token losses."""
        return {"loss": self._token_losses(model, batch).sum()}

    def derived_metrics(self, means: Mapping[str, float], /) -> dict[str, float]:
        """The perplexity."""
        return {"perplexity": perplexity(means["loss"])} if "loss" in means else {}

    def validation_step(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        """Sums of token losses, of targets, and of bytes of the targets' text."""
        labels = batch["labels"]
        sums = {"loss": self._token_losses(model, batch).double().sum(), "targets": (labels != IGNORE_INDEX).sum()}
        if self._token_lengths is not None:
            self._token_lengths = self._token_lengths.to(labels.device)
            sums["bytes"] = self._token_lengths[labels[labels != IGNORE_INDEX]].sum()
        return sums

    def validation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Mean loss in nats per token, perplexity, and bits per byte, which compares across tokenizers."""
        loss = sums["loss"] / max(sums["targets"], 1)
        metrics = {"validation_loss": loss, "validation_perplexity": perplexity(loss)}
        if sums.get("bytes"):
            metrics["validation_bits_per_byte"] = sums["loss"] / math.log(2) / sums["bytes"]
        return metrics

    @staticmethod
    def _token_losses(model: ForwardFn, batch: Batch) -> Tensor:
        return model(batch["input_ids"], position_ids=batch["position_ids"], labels=batch["labels"])
