"""AnswerDataModule: what the DataModules for preferences share. A sample has a prompt and answers, each in a row of its own."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

from bumblebee.datamodule import SampleT
from bumblebee.utils.formatting import number
from datamodules.collate import TokenDataset
from datamodules.mixture import Files
from datamodules.token_datamodule import TokenDataModule


class AnswerDataset(TokenDataset[SampleT]):
    """Samples that fit into rows of ``max_length`` positions, see ``answer_rows.py``.

    Attributes:
        dropped: number of samples that do not fit.
        truncated: number of samples whose prompt is cut from the left.
    """

    dropped: int
    truncated: int


AnswerDatasetT = TypeVar("AnswerDatasetT", bound=AnswerDataset)


class AnswerDataModule(TokenDataModule[SampleT, AnswerDatasetT], Generic[SampleT, AnswerDatasetT]):
    """Prompts with two answers each. Subclasses describe the options."""

    rows_per_sample = 2

    def __init__(
        self,
        files: Files,
        tokenizer: str,
        max_length: int = 1024,
        system: str | None = None,
        too_long: Literal["drop", "keep_end"] = "drop",
        validation_files: str | list[str] | None = None,
        validation_ratio: float = 0.0,
        deduplicate: bool = False,
        on_bad_record: Literal["stop", "skip"] = "stop",
        cache_dir: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(
            files, tokenizer, max_length, validation_files, validation_ratio, deduplicate, on_bad_record, cache_dir
        )
        self.chat_template = chat_template
        self.system, self.too_long = system, too_long

    def setup(self, seed: int) -> None:
        """Tokenize, hold out, fit into rows."""
        super().setup(seed)
        self.stop_ids = self.tokenizer.chat_template.end_of_turn_ids

    def omitted(self, dataset: AnswerDatasetT) -> dict[str, int | str]:
        """See the base class."""
        lines: dict[str, int | str] = {}
        if dataset.dropped:
            lines[f"longer than max_length {self.max_length}"] = f"{number(dataset.dropped)} dropped"
        if dataset.truncated:
            lines["prompts cut from the left"] = dataset.truncated
        return lines
