"""Data check: the recipe's own first batches against a recomputation in plain Python, and the samples of a whole epoch.

Takes the batches from the loader that trains. Every position of every row is compared with the token stream: inputs, labels,
positions, padding. The number of targets is the task's. The spans of an epoch must hold each target once.

A DataModule whose samples do not tell their spans is only checked for what a batch shows by itself: positions that begin at 0
and count up, and labels that are the next input.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from bumblebee.datamodule import Batch, DataModule
from bumblebee.distributed import process_group
from bumblebee.nn import IGNORE_INDEX
from bumblebee.recipe import Run
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.training import loader
from bumblebee.training.plan import Plan
from bumblebee.verify.check_result import CheckResult, Measurement
from bumblebee.verify.context import Context
from bumblebee.verify.reference_data import ReferenceData, SpanDataset, step_samples

MAX_TOKENS = 200_000  # positions compared
MAX_STEPS = 20
MAX_STREAM = 30_000_000  # tokens of a stream whose spans are all counted
INPUTS, POSITIONS, LABELS = "wrong inputs", "positions that do not restart", "labels that are not the next token"
BORDERS, UNTRAINED, PADDING = "labels across documents", "trained tokens that are not targets", "trained padding"
COUNT, BATCHES = "miscounted targets", "wrong micro-batches"
LOST, DOUBLE = "lost targets", "double targets"
ALL = (INPUTS, POSITIONS, LABELS, BORDERS, UNTRAINED, PADDING, COUNT, BATCHES, LOST, DOUBLE)


def run(context: Context) -> CheckResult:
    """Count what is wrong. The note gives the number of positions that were compared."""
    recipe = context.subject.run
    assert recipe is not None
    train = recipe.data.train
    names: tuple[str, ...] = ALL
    if isinstance(train, SpanDataset):
        errors, note = _compare(recipe, ReferenceData(train))
        errors += _epoch_errors(recipe.data, ReferenceData(train))
    else:
        errors, note = _structure(recipe)
        names = (POSITIONS, LABELS)
    return CheckResult(tuple(Measurement(name, float(errors[name]), 0.0) for name in names), note)


def _micro_batches(recipe: Run) -> Iterator[tuple[int, int, Batch]]:
    """Step, index in the step, and micro-batch: from the loader, up to the end of the first epoch."""
    trainer, data = recipe.trainer, recipe.data
    ranks, rank = process_group.world_size(), process_group.rank()
    sizes = trainer.micro_batch_size, trainer.accumulate
    steps = min(math.ceil(len(data.train) / (sizes[0] * sizes[1] * ranks)), MAX_STEPS)
    plan = Plan.of(len(data.train), *sizes, ranks, trainer.epochs, steps)
    compared = 0
    for step, window in enumerate(loader.train_windows(data, plan, recipe.seed, rank, 0, workers=0, pin_memory=False)):
        for index, batch in enumerate(window):
            yield step, index, batch
            compared += batch["input_ids"].numel()
            if compared >= MAX_TOKENS:
                return


def _compare(recipe: Run, reference: ReferenceData) -> tuple[Counter[str], str]:
    """Differences between the first micro-batches and the token stream."""
    trainer, data = recipe.trainer, recipe.data
    sizes = trainer.micro_batch_size, trainer.accumulate, process_group.world_size()
    order = loader.epoch_order(len(data.train), recipe.seed, 0, data.lengths).tolist()
    errors: Counter[str] = Counter({BATCHES: len(data.train) - len(set(order))})
    positions = rows = 0
    for step, index, batch in _micro_batches(recipe):
        micro_batches = step_samples(order, step, process_group.rank(), sizes)
        samples = micro_batches[index] if index < len(micro_batches) else []
        expected = [reference.samples.spans(sample) for sample in samples]
        targets = _compare_batch(errors, reference, batch, expected)
        if isinstance(recipe.task, LanguageModeling):
            errors[COUNT] += abs(int(recipe.task.counts(batch)["loss"]) - targets)
        positions, rows = positions + batch["input_ids"].numel(), rows + len(batch["input_ids"])
    return errors, f"{positions:,} positions in {rows} rows compared"


def _compare_batch(errors: Counter[str], reference: ReferenceData, batch: Batch, samples: list[list[tuple[int, int]]]) -> int:
    """Compare one micro-batch and return its number of targets. A batch without samples must have no targets."""
    inputs, labels, positions = (batch[name].tolist() for name in ("input_ids", "labels", "position_ids"))
    if not samples:
        errors[PADDING] += sum(label != IGNORE_INDEX for row in labels for label in row)
        return 0
    rows = _rows(samples, len(inputs))
    if rows is None or any(sum(length for _, length in spans) > len(inputs[0]) for spans in rows):
        errors[BATCHES] += 1
        return 0
    targets = 0
    longest = max(length for spans in rows for _, length in spans)
    for row, spans in enumerate(rows):
        actual = zip(inputs[row], labels[row], positions[row], strict=True)
        for (token, label, position), right in zip(actual, reference.row(spans, len(inputs[row]), IGNORE_INDEX), strict=True):
            if right is None:  # padding, which no token attends to; its positions must not exceed those of tokens
                errors[PADDING] += label != IGNORE_INDEX
                errors[POSITIONS] += not 0 <= position <= max(longest - 1, 1)
                continue
            right_token, right_label, right_position, is_last = right
            targets += right_label != IGNORE_INDEX
            errors[POSITIONS] += position != right_position
            errors[INPUTS] += token != right_token
            if label != right_label:
                errors[BORDERS if is_last else UNTRAINED if right_label == IGNORE_INDEX else LABELS] += 1
    return targets


def _rows(samples: list[list[tuple[int, int]]], rows: int) -> list[list[tuple[int, int]]] | None:
    """Spans of each row: a sample is a row, or each of its spans is one; None if the batch has another number of rows."""
    if rows == len(samples):
        return samples
    split = [[span] for spans in samples for span in spans]
    return split if rows == len(split) else None


def _epoch_errors(data: DataModule, reference: ReferenceData) -> Counter[str]:
    """Targets that the samples of an epoch lack or have too often; nothing for a very large stream."""
    samples = getattr(data, "epoch_samples", None)
    if samples is None or len(reference.tokens) > MAX_STREAM:
        return Counter()
    per_sample = 2 if len(reference.ends) == 2 * len(getattr(data, "cache", ())) else 1  # a pair has two sequences
    omits = getattr(data, "too_long", None) not in (None, "split")
    lost, double = reference.lost_and_double(samples, per_sample, data.max_length if omits else None)  # type: ignore[attr-defined]
    return Counter({LOST: lost, DOUBLE: double})


def _structure(recipe: Run) -> tuple[Counter[str], str]:
    """What a batch shows by itself."""
    errors: Counter[str] = Counter()
    rows = 0
    for _, _, batch in _micro_batches(recipe):
        names = ("input_ids", "labels", "position_ids")
        if not all(name in batch for name in names):
            return errors, f"{type(recipe.data).__qualname__}: batches without {', '.join(names)} are not checked"
        for inputs, labels, positions in zip(*(batch[name].tolist() for name in names), strict=True):
            rows += 1
            errors[POSITIONS] += positions[0] != 0
            for t in range(1, len(inputs)):
                errors[POSITIONS] += positions[t] not in (0, positions[t - 1] + 1)
                errors[LABELS] += positions[t] != 0 and labels[t - 1] not in (IGNORE_INDEX, inputs[t])
    return errors, f"{type(recipe.data).__qualname__}: {rows} rows compared, without the files that they come from"
