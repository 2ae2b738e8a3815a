"""BigramBaseline: what a model that only sees the last token would reach on the held-out text.

A trained model that is not clearly better has learned nothing but which token tends to follow which. The baseline counts
pairs of the very inputs and targets that the model is trained on, and smooths by absolute discounting: what is taken from the
counts of seen pairs goes to the frequencies of single tokens (Ney, Essen and Kneser 1994).
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
    """Prints the held-out bits per byte of a smoothed bigram model, at the start and beside the trained model's at the end.

    Args:
        discount: what is taken from the count of each seen pair, between 0 and 1.
    """

    def __init__(self, discount: float = 0.75) -> None:
        if not 0 < discount < 1:
            raise ValueError(f"discount must be between 0 and 1, got {discount}")
        self.discount = discount
        self.bits_per_byte: float | None = None
        self.latest: float | None = None

    def on_fit_start(self, trainer: Trainer) -> None:
        """Count, measure, and say so.

        Raises:
            ValueError: nothing is held out.
        """
        if not len(trainer.data.validation or ()) or trainer.data.tokenizer is None:
            raise ValueError("callbacks: BigramBaseline needs held-out data with a tokenizer: set data.validation_ratio")
        if not trainer.is_main:
            return
        self.bits_per_byte = bigram_bits_per_byte(trainer.data, self.discount)
        trainer.log("bigram_bits_per_byte", self.bits_per_byte)
        print(f"a smoothed bigram model reaches {self.bits_per_byte:.3f} bits per byte on the held-out text", flush=True)

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Keep the trained model's figure."""
        self.latest = metrics.get("validation_bits_per_byte")

    def on_fit_end(self, trainer: Trainer) -> None:
        """Both figures on one line."""
        if trainer.is_main and self.latest is not None:
            print(f"held-out text, bits per byte: this model {self.latest:.3f}, smoothed bigrams {self.bits_per_byte:.3f}")


def bigram_bits_per_byte(data: DataModule, discount: float) -> float:
    """Bits per byte of the held-out targets under a bigram model of the training targets."""
    import numpy as np

    assert data.tokenizer is not None
    first, second = pairs(data, data.train)
    held_first, held_second = pairs(data, data.validation or ())
    p = bigram_probabilities(first, second, held_first, held_second, data.tokenizer.vocab_size, discount)
    lengths = np.array([len(piece) for piece in data.tokenizer.token_bytes])
    return float(-np.log(p).sum() / math.log(2) / lengths[held_second].sum())


def pairs(data: DataModule, samples: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Each target of the samples with the token before it."""
    import numpy as np

    firsts, seconds = [], []
    for index in range(len(samples)):
        batch = data.collate([samples[index]])
        wanted = batch["labels"] != IGNORE_INDEX
        firsts.append(batch["input_ids"][wanted].numpy())
        seconds.append(batch["labels"][wanted].numpy())
    return np.concatenate(firsts), np.concatenate(seconds)


def bigram_probabilities(
    first: np.ndarray, second: np.ndarray, held_first: np.ndarray, held_second: np.ndarray, vocab_size: int, discount: float
) -> np.ndarray:
    """p(second | first) of each held-out pair, with counts from the training pairs.

    p(b | a) = max(c(ab) - d, 0) / c(a) + d n(a) / c(a) p(b),  where n(a) is how many different tokens followed a, and the
    single tokens' p(b) is smoothed by adding one to each count. Where a was never seen, p(b).
    """
    import numpy as np

    single = (np.bincount(second, minlength=vocab_size) + 1) / (len(second) + vocab_size)
    seen, counts = np.unique(first * vocab_size + second, return_counts=True)
    total = np.bincount(first, minlength=vocab_size)
    followers = np.bincount(seen // vocab_size, minlength=vocab_size)

    wanted = held_first * vocab_size + held_second
    place = np.minimum(np.searchsorted(seen, wanted), len(seen) - 1)
    count = np.where(seen[place] == wanted, counts[place], 0)
    context = np.maximum(total[held_first], 1)
    rest = np.where(total[held_first] > 0, discount * followers[held_first] / context, 1.0)
    return np.maximum(count - discount, 0) / context + rest * single[held_second]
