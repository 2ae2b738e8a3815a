"""DataModule: the base class of everything that provides training batches.

A DataModule prepares its samples once (``setup``); then ``train[i]`` and ``collate`` are called. It does not decide which
samples form which micro-batch on which rank: that depends only on (seed, epoch, step), in ``bumblebee/training``, so that any
run can be resumed at any micro-batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from bumblebee.nn import IGNORE_INDEX

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from bumblebee.tokenizer.tokenizer import Tokenizer

Batch = dict[str, "Tensor"]
SampleT = TypeVar("SampleT")


class DataModule(ABC, Generic[SampleT]):
    """Provides training batches. ``setup`` sets ``train`` and, if there are any, ``validation`` and ``tokenizer``.

    Attributes:
        train: training samples, by index.
        validation: validation samples, or None.
        tokenizer: saved into every model folder of the run, or None.
        stop_ids: token ids that end an answer, besides the end-of-text token; saved in the model folder's configuration.
        lengths: int (len(train),), length of each training sample in tokens, to batch samples of similar length; or None.
    """

    has_prompts: ClassVar[bool] = True  # whether samples hold answers to prompts; not so in pretraining
    has_targets: ClassVar[bool] = True  # whether batches have labels; not so prompts, whose answers are sampled
    rows_per_sample: ClassVar[int] = 1  # of a batch; 2 if a sample has two answers, of which one may be a bad one
    train: Sequence[SampleT]
    validation: Sequence[SampleT] | None = None
    tokenizer: Tokenizer | None = None
    stop_ids: Sequence[int] = ()
    lengths: np.ndarray | None = None

    @abstractmethod
    def setup(self, seed: int) -> None:
        """Prepare the samples. Called once on every rank, after the process group is initialized.

        Raises:
            ValueError: invalid files or records.
        """

    @abstractmethod
    def collate(self, samples: list[SampleT]) -> Batch:
        """Return one micro-batch of tensors on the CPU."""

    def without_targets(self, batch: Batch) -> Batch:
        """Return the batch without targets, for ranks that run out of samples in the last step of an epoch."""
        return {**batch, "labels": batch["labels"].clone().fill_(IGNORE_INDEX)}  # a batch of one may share the sample's memory

    def ordered(self, order: np.ndarray) -> np.ndarray:
        """Return the order of an epoch's samples, given a shuffled one; it must depend on that and the samples alone."""
        return order

    def origin(self, index: int) -> str:
        """Describe where a training sample comes from: file and line where they are known."""
        return f"sample {index}"

    def fingerprint(self) -> Mapping[str, str]:
        """Return digests of the training samples in their order, by name; empty if there are none.

        A checkpoint stores them, and a run that resumes it must have the same ones. They must not depend on ranks and batch
        sizes, or on where files are.
        """
        return {}

    def summary(self) -> dict[str, object]:
        """Return counts that describe the data, in the order in which they are displayed."""
        return {"training samples": len(self.train), "validation samples": len(self.validation or ())}
