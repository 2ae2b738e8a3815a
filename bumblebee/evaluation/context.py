"""EvaluationContext: the model that is evaluated, and the settings that all tasks of an evaluation share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bumblebee.datamodule import DataModule

if TYPE_CHECKING:
    from bumblebee.inference.generator import Generator

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class EvaluationContext:
    """What a task is evaluated on.

    Args:
        generator: the model.
        data: a recipe's data, set up; None without a recipe.
        split: the samples of ``data`` that are used.
        chat: ask questions through the chat template, unless a task has a setting of its own.
        fewshot: number of solved examples before each question, unless a task has a setting of its own.
    """

    generator: Generator
    data: DataModule | None = None
    split: Split = "validation"
    chat: bool = False
    fewshot: int = 0

    def samples(self, own: DataModule | None, task: str) -> tuple[DataModule, Sequence[object]]:
        """The data of a task and its samples: all of the task's own data, or a split of the recipe's.

        Raises:
            ValueError: there is neither, or the split has no samples.
        """
        if own is not None:
            own.setup(0)
            vocabularies = [each.backend.get_vocab() for each in (own.tokenizer, self.generator.tokenizer) if each is not None]
            if vocabularies[:1] != vocabularies[1:]:
                raise ValueError(f"the tokenizer of {task}'s data is not that of the model")
            return own, own.train
        if self.data is None:
            raise ValueError(f"{task} needs data: name a file, as {task}:FILE, or a recipe with --config")
        chosen = self.data.train if self.split == "train" else self.data.validation
        if not chosen:
            raise ValueError("the recipe's data has no validation samples: set data.validation_ratio or data.validation_files")
        return self.data, chosen
