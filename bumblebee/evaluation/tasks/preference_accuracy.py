"""PreferenceAccuracy: how often the model prefers the chosen response of a pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from bumblebee.datamodule import DataModule
from bumblebee.evaluation.context import EvaluationContext
from bumblebee.evaluation.scoring import score
from bumblebee.evaluation.tasks.segments import Segment, segments_of
from bumblebee.evaluation.tasks.task import EvaluationTask, Progress, SampleResult
from bumblebee.inference.generator import Generator

Pair = tuple[Segment, Segment]  # chosen and rejected


class PreferenceAccuracy(EvaluationTask[Pair]):
    """Shares of pairs whose chosen response has the higher log-probability (``acc``) and the higher log-probability per token
    (``acc_norm``).

    With a reference also ``reward_acc``: the higher implicit reward, log p - log p_reference, as DPO's rewards/accuracies.

    Args:
        data: preference pairs, as of datamodules.Preferences; null for the recipe's data.
        reference: model folder of the reference, such as the model before DPO.
    """

    metric: ClassVar[str] = "acc"

    def __init__(self, data: DataModule | None = None, reference: str | None = None) -> None:
        self.data, self.reference = data, reference

    def items(self, context: EvaluationContext) -> list[Pair]:
        """The pairs of the data.

        Raises:
            ValueError: the data has no pairs.
        """
        data, samples = context.samples(self.data, "preference_accuracy")
        pairs: list[Pair] = []
        for index in range(len(samples)):
            rows = list(segments_of(data, samples[index]))
            if len(rows) != 2 or any(len(row) != 1 for row in rows):
                raise ValueError(
                    f"preference_accuracy needs pairs, as of datamodules.Preferences; {type(data).__name__} has none"
                )
            pairs.append((rows[0][0], rows[1][0]))
        return pairs

    def results(self, context: EvaluationContext, items: Sequence[Pair], progress: Progress) -> list[SampleResult]:
        """Log-probabilities of both responses."""
        requests = [segment.continuation() for pair in items for segment in pair]
        models = [context.generator]
        if self.reference is not None:
            models.append(Generator.from_pretrained(self.reference, str(context.generator.device)))
        sums: list[list[float]] = []
        for model in models:
            scores = score(model, requests)
            segments = [segment for pair in items for segment in pair]
            sums.append([math.fsum(s.target_log_probs(each.token_log_probs)) for s, each in zip(segments, scores, strict=True)])
        progress(len(items))
        return [_result(context, pair, [each[2 * index : 2 * index + 2] for each in sums]) for index, pair in enumerate(items)]


def _result(context: EvaluationContext, pair: Pair, log_probs: list[list[float]]) -> SampleResult:
    """The result of a pair, from the log-probabilities (chosen, rejected) of the model and of the reference, if any."""
    decode = context.generator.tokenizer.decode
    chosen, rejected = pair
    own, *references = log_probs
    means = [log_prob / len(segment.targets) for log_prob, segment in zip(own, pair, strict=True)]
    scores = {"acc": float(own[0] > own[1]), "acc_norm": float(means[0] > means[1])}
    details: dict[str, object] = {"log_probs": own, "rejected": decode(rejected.targets)}
    for reference in references:
        scores["reward_acc"] = float(own[0] - reference[0] > own[1] - reference[1])
        details["reference_log_probs"] = reference
    texts = [decode(segment.targets) for segment in pair]
    preferred = texts[0] if own[0] > own[1] else texts[1]
    return SampleResult(decode(chosen.ids[: chosen.first + 1]), preferred, texts[0], scores, details)
