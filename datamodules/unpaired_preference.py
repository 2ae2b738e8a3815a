"""UnpairedPreferences: single answers that are good or bad, for KTO.

Records are conversations in any chat format with a ``label``, true or false, for their last answer; a preference pair is two
examples. See conversations.py. A batch has two rows for each example: 2i is prompt and answer, 2i + 1 the same prompt and the
answer of another record, from which KTO estimates how far the model has moved from its reference. Which one is fixed for a run,
whatever the batches.
"""

from __future__ import annotations

import numpy as np
import torch

from bumblebee.datamodule import Batch
from bumblebee.nn import IGNORE_INDEX
from bumblebee.utils.formatting import number, plural
from datamodules.answer_rows import TooLong, fit_answers
from datamodules.answers import AnswerDataModule, AnswerDataset
from datamodules.collate import collate_rows, padded_width
from datamodules.token_cache import Segment, TokenCache
from datamodules.tokenize import LabelledTokenizer

# Index among the training samples, whether the answer is good, prompt + answer and prompt + another record's answer.
Example = tuple[int, bool, Segment, Segment]


class LabelledDataset(AnswerDataset[Example]):
    """Answers that fit into rows of ``max_length`` positions.

    Args:
        cache: samples of one or several sequences, whose values are labels.
        samples: indices of its samples.
        max_length: positions in a row.
        too_long: see ``fit_answers``. The prompt before another record's answer is always cut from the left.
    """

    def __init__(self, cache: TokenCache, samples: np.ndarray, max_length: int, too_long: TooLong) -> None:
        assert cache.values is not None
        sequences, group = _sequences(cache, samples)
        rows = fit_answers(cache, sequences[None], max_length, too_long)
        self.cache, self.max_length = cache, max_length
        self.starts, self.row_lengths, self.answers = rows.starts[0], rows.lengths[0], rows.answers[0]
        self.dropped, self.truncated = rows.dropped, rows.truncated
        self.labels = cache.values[sequences[rows.fits]] > 0
        self.others = _others(group[rows.fits])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        own = self.cache.segment(int(self.starts[index]), int(self.row_lengths[index]))
        return int(index), bool(self.labels[index]), own, self._mismatched(index)

    def _mismatched(self, index: int) -> Segment:
        """The prompt with the answer of another record."""
        other = self.others[index]
        end, length = self.starts[other] + self.row_lengths[other] + 1, self.answers[other]
        prompt_end = self.starts[index] + self.row_lengths[index] + 1 - self.answers[index]
        begin = max(self.starts[index], prompt_end - (self.max_length + 1 - length))
        prompt = self.cache.tokens[begin:prompt_end].astype(np.int64)
        answer = self.cache.tokens[end - length : end].astype(np.int64)
        blank = np.full(len(prompt) - 1, IGNORE_INDEX)
        return np.concatenate([prompt, answer])[:-1], np.concatenate([blank, answer])

    def spans(self, index: int) -> list[tuple[int, int]]:
        """See the base class."""
        return [(int(self.starts[index]), int(self.row_lengths[index]))]

    def layout(self) -> tuple[np.ndarray, ...]:
        """See the base class."""
        return self.starts, self.row_lengths, self.others

    def origin(self, index: int) -> str:
        """See the base class."""
        return self.cache.origin(int(self.cache.samples_at(self.starts[index : index + 1])[0]))


def _sequences(cache: TokenCache, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the sequences of some samples, and the number of the sample that each belongs to."""
    sequences = cache.sequences_of(samples)
    owners = cache.samples_at(cache.begins[sequences])
    return sequences, np.cumsum(np.concatenate([[0], np.diff(owners) != 0])) if len(owners) else owners


def _others(group: np.ndarray) -> np.ndarray:
    """For each example one of another group, each used once: groups in a fixed random order, moved on by the largest group."""
    if not len(group):
        return group
    sizes = np.unique(group, return_counts=True)[1]
    rank = np.random.Generator(np.random.PCG64(0)).permutation(int(group.max()) + 1)
    order = np.argsort(rank[group], kind="stable")
    others = np.empty_like(order)
    others[order] = np.roll(order, int(sizes.max()))
    return others


class UnpairedPreferences(AnswerDataModule[Example, LabelledDataset]):
    """Answers with a label: good or bad.

    Args:
        files: a path or glob of .json, .jsonl and .parquet files, or a list of them and of {path, weight} entries, where
            weight is how often each record occurs in an epoch (a fraction selects that share of them). A record has a label,
            true or false, or is a preference pair, which becomes two examples.
        tokenizer: folder with tokenizer.json, and optionally a chat template; the default is ChatML.
        max_length: tokens in a row.
        system: system prompt for prompts that do not have one; null adds none.
        too_long: drop examples that do not fit, or keep_end: cut prompts from the left. Answers are never cut.
        validation_files: held-out files.
        validation_ratio: share of the records to hold out if there are no such files; equal ones are held out together.
        deduplicate: keep one of the records that differ in whitespace only.
        on_bad_record: "stop", or "skip" to omit bad records and count them.
        cache_dir: where tokens are kept between runs; by default $BUMBLEBEE_CACHE or ~/.cache/bumblebee.
        chat_template: path of a Jinja file, or "chatml", to use instead of the folder's template; saved with the model.

    Raises:
        ValueError: a number is out of range, or the folder has no tokenizer.
    """

    record_noun = "records"

    train: LabelledDataset
    validation: LabelledDataset | None = None

    def setup(self, seed: int) -> None:
        """Tokenize, hold out, fit into rows."""
        super().setup(seed)
        self.lengths = self.train.row_lengths

    def record_tokenizer(self) -> LabelledTokenizer:
        """Prompts and answers to ids."""
        return LabelledTokenizer(self.tokenizer_folder, self.tokenizer, self.system)

    def make_dataset(self, cache: TokenCache, samples: np.ndarray) -> LabelledDataset:
        """The examples that fit."""
        return LabelledDataset(cache, samples, self.max_length, self.too_long)

    def collate(self, samples: list[Example]) -> Batch:
        """Examples -> ``input_ids``, ``labels``, ``position_ids``, each (2 * examples, T) int64; see the module.

        ``index`` is (examples,) int64, ``desirable`` (examples,) bool. Labels mark the tokens of the answers.
        """
        rows = [[segment] for *_, own, mismatched in samples for segment in (own, mismatched)]
        batch = collate_rows(rows, padded_width(rows), self.pad_token_id)
        batch["index"] = torch.tensor([index for index, *_ in samples])
        batch["desirable"] = torch.tensor([label for _, label, *_ in samples])
        return batch

    def summary(self) -> dict[str, object]:
        """Examples, tokens of the answers, omitted ones."""
        lines = super().summary()
        good, tokens, targets = int(self.train.labels.sum()), int(self.train.row_lengths.sum()), int(self.train.answers.sum())
        lines["examples"] = f"{number(good)} desirable, {number(len(self.train) - good)} undesirable"
        lines["answer tokens"] = f"{number(targets)} of {number(tokens)} ({targets / tokens:.1%})"
        if self.validation is not None:
            lines["held out"] = plural(len(self.validation), "example")
        return lines
