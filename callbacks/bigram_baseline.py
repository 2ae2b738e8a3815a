"""BigramBaseline: bits per byte of a smoothed bigram model on the validation samples, to compare the trained model with.

A model that is not clearly better has learned nothing but which token tends to follow which. The baseline counts the pairs of
inputs and targets that the model is trained on, smoothed by absolute discounting: the discount of seen pairs is given to the
unigram distribution (Ney, Essen and Kneser 1994).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bumblebee.callback import Callback
from bumblebee.nn import IGNORE_INDEX

if TYPE_CHECKING:
    import numpy as np

    from bumblebee.datamodule import DataModule
    from bumblebee.trainer import Trainer


class BigramBaseline(Callback):
    """Prints the validation bits per byte of a smoothed bigram model at the start, and next to the trained model's at the end.

    Args:
        discount: subtracted from the count of each seen pair, between 0 and 1.
    """

    def __init__(self, discount: float = 0.75) -> None:
        if not 0 < discount < 1:
            raise ValueError(f"discount must be between 0 and 1, got {discount}")
        self.discount = discount
        self.bits_per_byte: float | None = None
        self.latest: float | None = None

    def check(self, trainer: Trainer) -> None:
        """Check the data.

        Raises:
            ValueError: the data has no validation samples or no tokenizer.
        """
        if not len(trainer.data.validation or ()):
            raise ValueError(
                "callbacks: BigramBaseline needs validation samples: set data.validation_ratio or data.validation_files"
            )
        if trainer.data.tokenizer is None:
            raise ValueError("callbacks: BigramBaseline needs a tokenizer: set data.tokenizer")

    def on_fit_start(self, trainer: Trainer) -> None:
        """Fit the bigram model, log its bits per byte and print them."""
        if not trainer.is_main:
            return
        self.bits_per_byte = bigram_bits_per_byte(trainer.data, self.discount)
        if trainer.step == 0:  # a resumed run has logged it
            trainer.log("bigram_bits_per_byte", self.bits_per_byte)
        trainer.print(f"bigram baseline: {self.bits_per_byte:.3f} bits per byte on the validation samples")

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Keep the trained model's latest value."""
        self.latest = metrics.get("validation_bits_per_byte")

    def on_fit_end(self, trainer: Trainer) -> None:
        """Print both values."""
        if trainer.is_main and self.latest is not None:
            trainer.print(f"validation bits per byte: {self.latest:.3f} (bigram baseline {self.bits_per_byte:.3f})")


def bigram_bits_per_byte(data: DataModule, discount: float) -> float:
    """Bits per byte of the validation targets under a bigram model of the training targets."""
    import numpy as np

    assert data.tokenizer is not None
    train_first, train_second = token_pairs(data, data.train)
    first, second = token_pairs(data, data.validation or ())
    probabilities = bigram_probabilities(train_first, train_second, first, second, data.tokenizer.vocab_size, discount)
    lengths = np.array([len(token) for token in data.tokenizer.token_bytes])
    return float(-np.log(probabilities).sum() / math.log(2) / lengths[second].sum())


def token_pairs(data: DataModule, samples: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The token before each target, and the target, of all samples: two arrays of token ids."""
    import numpy as np

    firsts, seconds = [], []
    for index in range(len(samples)):
        batch = data.collate([samples[index]])
        is_target = batch["labels"] != IGNORE_INDEX
        firsts.append(batch["input_ids"][is_target].numpy())
        seconds.append(batch["labels"][is_target].numpy())
    return np.concatenate(firsts), np.concatenate(seconds)


def bigram_probabilities(
    train_first: np.ndarray, train_second: np.ndarray, first: np.ndarray, second: np.ndarray, vocab_size: int, discount: float
) -> np.ndarray:
    """p(second | first) of each pair, with counts from the training pairs.

    p(b | a) = max(c(ab) - d, 0) / c(a) + d n(a) / c(a) p(b),  where n(a) is the number of distinct tokens that follow a, and
    the unigram p(b) has add-one smoothing. Where a was never seen, p(b).
    """
    import numpy as np

    unigram = (np.bincount(train_second, minlength=vocab_size) + 1) / (len(train_second) + vocab_size)
    seen, counts = np.unique(train_first * vocab_size + train_second, return_counts=True)
    total = np.bincount(train_first, minlength=vocab_size)
    followers = np.bincount(seen // vocab_size, minlength=vocab_size)

    pairs = first * vocab_size + second
    index = np.minimum(np.searchsorted(seen, pairs), len(seen) - 1)
    count = np.where(seen[index] == pairs, counts[index], 0)
    context = np.maximum(total[first], 1)
    backoff = np.where(total[first] > 0, discount * followers[first] / context, 1.0)
    return np.maximum(count - discount, 0) / context + backoff * unigram[second]
