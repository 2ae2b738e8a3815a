"""Samples as text with their targets highlighted. Needs nothing but batches, so that it works with any DataModule.

A row of a batch has ``input_ids`` and ``labels`` (T,): labels[t] is the target at position t, -100 for none. So the token at t
is a target if labels[t - 1] equals it. A label that no position holds, as at the end of a row, is shown too.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bumblebee.datamodule import Batch, DataModule
from bumblebee.nn import IGNORE_INDEX

if TYPE_CHECKING:
    from bumblebee.tokenizer.tokenizer import Tokenizer

Cell = tuple[str, bool]  # a character, and whether it belongs to a target
Run = tuple[list[int], bool] | None  # consecutive token ids, and whether they are targets; None separates packed documents


@dataclass(frozen=True)
class Highlight:
    """Text around targets."""

    begin: str
    end: str

    @classmethod
    def for_stdout(cls) -> Highlight:
        """Bold green on a terminal; brackets elsewhere and if NO_COLOR is set (no-color.org)."""
        no_color = bool(os.environ.get("NO_COLOR")) or not sys.stdout.isatty()
        return cls("⟦", "⟧") if no_color else cls("\033[1;32m", "\033[0m")

    @property
    def legend(self) -> str:
        """One line that explains the symbols."""
        return f"{self.begin}targets{self.end} are trained on; ⏎ is a line break, │ the end of a packed document"


@dataclass(frozen=True)
class Row:
    """A row of a batch.

    Args:
        runs: token ids, split where targets begin or end.
        positions: the row's length. A sequence of n tokens takes n - 1 of them, since its last token is only a label.
        padding: number of positions at the end that hold padding.
    """

    runs: list[Run]
    positions: int
    padding: int

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return sum(len(run[0]) for run in self.runs if run is not None)


def rows_of(batch: Batch) -> list[Row]:
    """Split a batch into rows. In a batch of prompts, without targets, ``lengths`` says where padding begins."""
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    positions = batch["position_ids"].tolist() if "position_ids" in batch else [[None] * len(row) for row in ids]
    if "lengths" in batch and (batch["labels"] == IGNORE_INDEX).all():
        lengths = batch["lengths"].tolist()
        return [Row([(row[:end], False)], len(row), len(row) - end) for row, end in zip(ids, lengths, strict=True)]
    return [_row(*row) for row in zip(ids, labels, positions, strict=True)]


def _row(ids: list[int], labels: list[int], positions: Sequence[int | None]) -> Row:
    end = len(ids) - _padding(ids, labels, positions)
    runs: list[Run] = []
    label = IGNORE_INDEX  # of the previous position

    def add(token: int, is_target: bool) -> None:
        last = runs[-1] if runs else None
        if last is None or last[1] != is_target:
            runs.append(([token], is_target))
        else:
            last[0].append(token)

    for index in range(end):
        starts_document = index > 0 and positions[index] == 0
        if label != IGNORE_INDEX and (starts_document or label != ids[index]):
            add(label, True)
            label = IGNORE_INDEX
        if starts_document:
            runs.append(None)
        add(ids[index], label != IGNORE_INDEX)
        label = labels[index]
    if label != IGNORE_INDEX:
        add(label, True)
    return Row(runs, len(ids), len(ids) - end)


def _padding(ids: list[int], labels: list[int], positions: Sequence[int | None]) -> int:
    """Number of identical tokens at the end that neither have a label nor are targets."""
    end = len(ids)
    while end > 0 and ids[end - 1] == ids[-1] and labels[end - 1] == IGNORE_INDEX:
        if end > 1 and labels[end - 2] != IGNORE_INDEX and positions[end - 1] != 0:
            break  # a target
        end -= 1
    return len(ids) - end


def cells_of(row: Row, tokenizer: Tokenizer | None) -> list[Cell]:
    """The characters of a row, special tokens spelled out; token ids without a tokenizer."""
    cells: list[Cell] = []
    for run in _split_at_characters(row.runs, tokenizer):
        if run is None:
            cells.append(("│", False))
            continue
        ids, is_target = run
        text = " ".join(map(str, ids)) + " " if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=False)
        cells += [(_printable(character), is_target) for character in text]
    return cells


def _split_at_characters(runs: list[Run], tokenizer: Tokenizer | None) -> Iterator[Run]:
    """Move run boundaries to character boundaries: a character whose tokens are in two runs belongs to the later one."""
    held: list[int] = []
    for index, run in enumerate(runs):
        if run is None or tokenizer is None:
            yield run
            continue
        ids, held = [*held, *run[0]], []
        has_next = index + 1 < len(runs) and runs[index + 1] is not None
        while has_next and ids and len(held) < 3 and tokenizer.decode(ids[-4:], skip_special_tokens=False).endswith("\ufffd"):
            held.insert(0, ids.pop())
        yield ids, run[1]


def _printable(character: str) -> str:
    if character == "\n":
        return "⏎"
    return " " if character == "\t" else character if character.isprintable() else "·"


def display_width(cells: list[Cell]) -> int:
    """Columns on a terminal, where some characters take two and some none."""
    return sum(_width(character) for character, _ in cells)


def _width(character: str) -> int:
    return 0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _count_that_fit(cells: list[Cell], width: int) -> int:
    """How many of the first cells fit into ``width`` columns, at least one."""
    used = 0
    for index, (character, _) in enumerate(cells):
        used += _width(character)
        if used > width and index:
            return index
    return len(cells)


def shorten(cells: list[Cell], width: int) -> list[Cell]:
    """Shorten to ``width`` columns: the beginning, and the first targets if the beginning has none."""
    if display_width(cells) <= width:
        return cells
    ellipsis = ("…", False)
    first_target = next((index for index, (_, is_target) in enumerate(cells) if is_target), 0)
    if first_target < _count_that_fit(cells, width * 3 // 4):
        return [*cells[: _count_that_fit(cells, width - 1)], ellipsis]
    head, rest = cells[: _count_that_fit(cells, width // 3)], cells[max(0, first_target - width // 12) :]
    tail = rest[: _count_that_fit(rest, width - width // 3 - 2)]
    return [*head, ellipsis, *tail, *([ellipsis] if len(tail) < len(rest) else [])]


def wrap(cells: list[Cell], highlight: Highlight, width: int) -> list[str]:
    """Wrap cells into lines of ``width`` columns, not counting highlights."""
    lines = []
    while cells:
        count = _count_that_fit(cells, width)
        lines.append(_highlighted(cells[:count], highlight))
        cells = cells[count:]
    return lines


def _highlighted(cells: list[Cell], highlight: Highlight) -> str:
    text, inside = "", False
    for character, is_target in cells:
        if is_target != inside:
            text += highlight.begin if is_target else highlight.end
        text, inside = text + character, is_target
    return text + (highlight.end if inside else "")


def _row_names(batch: Batch, rows: int) -> list[str]:
    """What the rows of one sample are: of a preference pair, of a labelled answer, or a single row."""
    if rows != 2:
        return [""] * rows
    if "desirable" in batch:
        return ["desirable" if bool(batch["desirable"][0]) else "undesirable", "its prompt, another answer"]
    return ["chosen", "rejected"]


def format_samples(
    data: DataModule,
    count: int,
    highlight: Highlight,
    width: int,
    height: int = 4,
    notes: Sequence[Sequence[str]] = (),
) -> list[str]:
    """Format the first training samples: their origin, their rows, two for a preference pair, and notes.

    Args:
        data: a DataModule that has been set up.
        count: number of samples.
        highlight: around targets.
        width: columns of a line.
        height: lines of a row.
        notes: further lines below each of the first samples.
    """
    lines = []
    for index in range(min(count, len(data.train))):
        batch = data.collate([data.train[index]])
        rows = rows_of(batch)
        for name, row in zip(_row_names(batch, len(rows)), rows, strict=True):
            padding = f", {row.padding} of them padding" if row.padding else ""
            size = f"{row.tokens} tokens in {row.positions} positions{padding}"
            head = f"{index + 1}  {name + ': ' if name else ''}{size}  {data.origin(index)}"
            lines.append(head if len(head) <= width else head[: width - 1] + "…")
            text = shorten(cells_of(row, data.tokenizer), (width - 6) * (height if len(rows) == 1 else height - 1))
            lines += [f"   {line}" for line in wrap(text, highlight, width - 5)]
        lines += [f"   → {note}" for note in (notes[index] if index < len(notes) else ())]
    return lines
