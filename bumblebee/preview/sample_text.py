"""Samples as text, the trained tokens marked. From batches alone: any DataModule's samples can be shown.

A batch's row is ``input_ids`` and ``labels`` (T,), where labels[t] is what position t is to predict, -100 for nothing. So the
token at t is trained if labels[t - 1] asks for it; a label that no position holds, as at the end of a row, is shown too.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bumblebee.datamodule import Batch, DataModule
from bumblebee.nn import IGNORE_INDEX

if TYPE_CHECKING:
    from bumblebee.tokenizer.tokenizer import Tokenizer

Cell = tuple[str, bool]  # a character, and whether it belongs to a trained token


@dataclass(frozen=True)
class Marks:
    """What stands around trained text."""

    begin: str
    end: str

    @classmethod
    def of_terminal(cls) -> Marks:
        """Green and bold on a terminal; brackets elsewhere, and where NO_COLOR is set (no-color.org)."""
        plain = bool(os.environ.get("NO_COLOR")) or not sys.stdout.isatty()
        return cls("⟦", "⟧") if plain else cls("\033[1;32m", "\033[0m")

    @property
    def legend(self) -> str:
        """What they mean."""
        return f"{self.begin}trained{self.end} tokens are targets; ⏎ is a line's end, │ the end of a packed text"


@dataclass(frozen=True)
class Row:
    """A row of a batch.

    Args:
        runs: (ids, trained) one after the other; None ends a packed text.
        padding: places at the end that hold nothing.
    """

    runs: list[tuple[list[int], bool] | None]
    padding: int

    @property
    def tokens(self) -> int:
        """What is not padding."""
        return sum(len(run[0]) for run in self.runs if run is not None)


def rows(batch: Batch) -> list[Row]:
    """The rows of a batch."""
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    positions = batch["position_ids"].tolist() if "position_ids" in batch else [[None] * len(row) for row in ids]
    return [_row(*row) for row in zip(ids, labels, positions, strict=True)]


def _row(ids: list[int], labels: list[int], positions: list[Any]) -> Row:
    end = len(ids) - _padding(ids, labels, positions)
    runs: list[tuple[list[int], bool] | None] = []
    asked = IGNORE_INDEX  # by the position before

    def add(token: int, trained: bool) -> None:
        last = runs[-1] if runs else None
        if last is None or last[1] != trained:
            runs.append(([token], trained))
        else:
            last[0].append(token)

    for place in range(end):
        begins = place > 0 and positions[place] == 0
        if asked != IGNORE_INDEX and (begins or asked != ids[place]):
            add(asked, True)
            asked = IGNORE_INDEX
        if begins:
            runs.append(None)
        add(ids[place], asked != IGNORE_INDEX)
        asked = labels[place]
    if asked != IGNORE_INDEX:
        add(asked, True)
    return Row(runs, len(ids) - end)


def _padding(ids: list[int], labels: list[int], positions: list[Any]) -> int:
    """Places at the end with one and the same token, of which nothing is asked and which nobody is to predict."""
    end = len(ids)
    while end > 0 and ids[end - 1] == ids[-1] and labels[end - 1] == IGNORE_INDEX:
        if end > 1 and labels[end - 2] != IGNORE_INDEX and positions[end - 1] != 0:
            break  # the position before predicts it
        end -= 1
    return len(ids) - end


def cells(row: Row, tokenizer: Tokenizer | None) -> list[Cell]:
    """A row's characters; ids where there is no tokenizer. Special tokens are spelled out."""
    found: list[Cell] = []
    for run in _whole_characters(row.runs, tokenizer):
        if run is None:
            found.append(("│", False))
            continue
        ids, trained = run
        text = " ".join(map(str, ids)) + " " if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=False)
        found += [(_visible(character), trained) for character in text]
    return found


def _whole_characters(runs: list[Any], tokenizer: Tokenizer | None) -> Iterator[tuple[list[int], bool] | None]:
    """The runs, cut where characters begin: one whose bytes are tokens of both kinds goes to the later run."""
    held: list[int] = []
    for place, run in enumerate(runs):
        if run is None or tokenizer is None:
            yield run
            continue
        ids, held = [*held, *run[0]], []
        later = place + 1 < len(runs) and runs[place + 1] is not None
        while later and ids and len(held) < 3 and tokenizer.decode(ids[-4:], skip_special_tokens=False).endswith("\ufffd"):
            held.insert(0, ids.pop())
        yield ids, run[1]


def _visible(character: str) -> str:
    if character == "\n":
        return "⏎"
    return " " if character == "\t" else character if character.isprintable() else "·"


def columns(found: list[Cell]) -> int:
    """How wide it is on a terminal, where some characters take two columns and some none."""
    return sum(_width(character) for character, _ in found)


def _width(character: str) -> int:
    return 0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _first(found: list[Cell], limit: int) -> int:
    """How many of the first cells fit into so many columns, at least one."""
    taken = 0
    for place, (character, _) in enumerate(found):
        taken += _width(character)
        if taken > limit and place:
            return place
    return len(found)


def shortened(found: list[Cell], limit: int) -> list[Cell]:
    """At most so many columns: the beginning, and where that holds nothing trained, the first trained characters as well."""
    if columns(found) <= limit:
        return found
    dots = ("…", False)
    trained = next((place for place, cell in enumerate(found) if cell[1]), 0)
    if trained < _first(found, limit * 3 // 4):
        return [*found[: _first(found, limit - 1)], dots]
    head, rest = found[: _first(found, limit // 3)], found[max(0, trained - limit // 12) :]
    shown_rest = rest[: _first(rest, limit - limit // 3 - 2)]
    return [*head, dots, *shown_rest, *([dots] if len(shown_rest) < len(rest) else [])]


def lines(found: list[Cell], marks: Marks, width: int) -> list[str]:
    """Cells as lines of so many columns, the marks not counted."""
    text = []
    while found:
        count = _first(found, width)
        text.append(_marked(found[:count], marks))
        found = found[count:]
    return text


def _marked(found: list[Cell], marks: Marks) -> str:
    text, inside = "", False
    for character, trained in found:
        if trained != inside:
            text += marks.begin if trained else marks.end
        text, inside = text + character, trained
    return text + (marks.end if inside else "")


def shown(data: DataModule, count: int, marks: Marks, width: int, height: int = 4) -> list[str]:
    """The first samples: where each came from, and its rows. A pair of responses has two.

    Args:
        data: set up.
        count: of samples.
        marks: around trained tokens.
        width: of a line.
        height: lines of a row.
    """
    text = []
    for number in range(min(count, len(data.train))):
        batch = data.collate([data.train[number]])
        found = rows(batch)
        names = ["chosen", "rejected"] if len(found) == 2 else [""] * len(found)
        for name, row in zip(names, found, strict=True):
            padding = f", {row.padding} of padding" if row.padding else ""
            head = f"{number + 1}  {name + ': ' if name else ''}{row.tokens} tokens{padding}  {data.origin(number)}"
            text.append(head if len(head) <= width else head[: width - 1] + "…")
            body = shortened(cells(row, data.tokenizer), (width - 6) * (height if len(found) == 1 else height - 1))
            text += [f"   {line}" for line in lines(body, marks, width - 5)]
    return text
