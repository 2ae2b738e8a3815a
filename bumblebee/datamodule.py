"""DataModule: where batches come from.

A DataModule prepares its samples once (``setup``), then answers ``train[i]`` and ``collate``. Which samples make up which
micro-batch of which rank is not its business: that follows from (seed, epoch, step) alone, in ``bumblebee/training``, and
``bumblebee/training/loader.py``, so that any run can be continued at any micro-batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bumblebee.nn import IGNORE_INDEX

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from bumblebee.tokenizer.tokenizer import Tokenizer

Batch = dict[str, "Tensor"]


class DataModule(ABC):
    """Where batches come from: sets ``train`` in ``setup``, and perhaps ``validation`` and ``tokenizer``.

    Attributes:
        train: samples to learn from, by index.
        validation: held-out samples, or None.
        tokenizer: saved into every model folder of the run, or None.
        stop_ids: what ends an answer in these data beside the tokenizer's end-of-text token: noted in the model's folder.
        lengths: int (len(train),), of each training sample, where batches shall be of samples of similar length; or None.
    """

    train: Sequence[Any]
    validation: Sequence[Any] | None = None
    tokenizer: Tokenizer | None = None
    stop_ids: Sequence[int] = ()
    lengths: np.ndarray | None = None

    @abstractmethod
    def setup(self, seed: int) -> None:
        """Prepare the samples. Called once on every rank, after the ranks have found each other.

        Raises:
            ValueError: files or records that cannot be used.
        """

    @abstractmethod
    def collate(self, samples: list[Any]) -> Batch:
        """Samples -> one micro-batch of tensors on the CPU."""

    def without_targets(self, batch: Batch) -> Batch:
        """The same batch with nothing to learn from: ranks that have run out of samples in an epoch's last step use it."""
        return {**batch, "labels": batch["labels"].clone().fill_(IGNORE_INDEX)}  # a batch of one may be the sample itself

    def origin(self, index: int) -> str:
        """Where a training sample came from, for people: files and lines where they are known."""
        return f"sample {index}"

    def summary(self) -> dict[str, Any]:
        """What to tell the user about the data: counts, in the order they are shown."""
        return {"training samples": len(self.train), "validation samples": len(self.validation or ())}
