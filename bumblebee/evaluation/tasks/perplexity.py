"""Perplexity: loss, perplexity and bits per byte on texts, as in validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from bumblebee.datamodule import DataModule
from bumblebee.evaluation.context import EvaluationContext
from bumblebee.evaluation.scoring import score
from bumblebee.evaluation.statistics import Estimate, ratio, scaled
from bumblebee.evaluation.tasks.segments import Segment, segments_of
from bumblebee.evaluation.tasks.task import EvaluationTask, Progress, SampleResult

MAX_LOSS = 80.0  # of a perplexity, as in bumblebee.tasks.language_modeling


class Perplexity(EvaluationTask[Segment]):
    """Loss per target token in nats, perplexity, and bits per byte of the targets' text.

    A sample is a document or conversation (or the part of one that fits into a window), so that standard errors are over these.
    Of preference pairs, the chosen responses are scored.

    Args:
        data: the texts; null for the recipe's data.
    """

    metric: ClassVar[str] = "bits_per_byte"

    def __init__(self, data: DataModule | None = None) -> None:
        self.data = data

    def items(self, context: EvaluationContext) -> list[Segment]:
        """The texts of all samples."""
        data, samples = context.samples(self.data, "perplexity")
        segments: list[Segment] = []
        for index in range(len(samples)):
            rows = list(segments_of(data, samples[index]))
            segments += [segment for row in rows[:: 2 if len(rows) == 2 else 1] for segment in row]
        return segments

    def results(self, context: EvaluationContext, items: Sequence[Segment], progress: Progress) -> list[SampleResult]:
        """Sums over each text's targets."""
        tokenizer, lengths = context.generator.tokenizer, [len(token) for token in context.generator.tokenizer.token_bytes]
        scores = score(context.generator, [item.continuation() for item in items], progress)
        results = []
        for item, each in zip(items, scores, strict=True):
            targets = item.targets
            sums = {
                "loss": -math.fsum(item.target_log_probs(each.token_log_probs)),
                "targets": float(len(targets)),
                "bytes": float(sum(lengths[target] for target in targets)),
            }
            results.append(SampleResult(tokenizer.decode(item.ids[: item.first + 1]), tokenizer.decode(targets), None, sums))
        return results

    def metrics(self, results: Sequence[SampleResult]) -> dict[str, Estimate]:
        """Sums over all samples, divided: long texts weigh more than short ones."""
        losses, targets, sizes = ([result.scores[name] for result in results] for name in ("loss", "targets", "bytes"))
        loss = ratio(losses, targets)
        perplexity = math.exp(min(loss.value, MAX_LOSS))
        metrics = {"loss": loss, "perplexity": scaled(loss, perplexity, perplexity)}
        if any(sizes):
            per_byte = ratio(losses, sizes)
            metrics["bits_per_byte"] = scaled(per_byte, per_byte.value / math.log(2), 1 / math.log(2))
        return metrics
