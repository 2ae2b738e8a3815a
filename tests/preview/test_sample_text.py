"""Samples as text: targets, and nothing else, are highlighted."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch
from helpers.training_runs import Pairs, Rows

from bumblebee.datamodule import Batch, DataModule
from bumblebee.preview.sample_text import Highlight, cells_of, display_width, format_samples, rows_of, shorten, wrap
from bumblebee.tokenizer.tokenizer import Tokenizer
from datamodules import SFT, Pretrain

BRACKETS = Highlight("⟦", "⟧")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.from_pretrained(tokenizer_folder)


def make_batch(ids: list[int], labels: list[int], positions: list[int] | None = None) -> Batch:
    batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
    return batch if positions is None else {**batch, "position_ids": torch.tensor([positions])}


def text(batch: Batch, tokenizer: Tokenizer | None = None) -> str:
    return "".join(wrap(cells_of(rows_of(batch)[0], tokenizer), BRACKETS, 10_000))


def test_token_is_highlighted_where_the_previous_label_equals_it():
    assert text(make_batch([1, 2, 3, 4], [-100, 3, 4, -100])) == "1 2 ⟦3 4 ⟧"


def test_label_after_the_last_token_is_shown():
    assert text(make_batch([1, 2], [2, 9])) == "1 ⟦2 9 ⟧"


def test_packed_documents_are_separated_and_keep_their_last_label():
    packed = make_batch([1, 2, 5, 6], [2, 9, 6, 9], [0, 1, 0, 1])
    assert text(packed) == "1 ⟦2 9 ⟧│5 ⟦6 9 ⟧"


@pytest.mark.parametrize("positions", [None, [0, 1, 2, 0, 0, 0]], ids=["no-positions", "positions"])
def test_padding_is_counted_and_not_shown(positions):
    row = rows_of(make_batch([1, 2, 7, 7, 7, 7], [2, 7, -100, -100, -100, -100], positions))[0]
    assert row.padding == 3
    assert row.tokens == 3


def test_eos_target_before_eos_padding_is_not_padding():
    row = rows_of(make_batch([1, 2, 7, 7, 7], [2, 7, -100, -100, -100], [0, 1, 0, 0, 0]))[0]
    assert (row.tokens, row.padding) == (3, 3)  # the trained 7 is only a label


def test_special_tokens_and_line_breaks_are_visible(tokenizer):
    ids = [*tokenizer.encode("a\nb"), tokenizer.eos_token_id]
    assert text(make_batch(ids, [*ids[1:], -100]), tokenizer).replace("⟦", "").replace("⟧", "") == "a⏎b<|endoftext|>"


def test_character_of_several_tokens_is_not_split(tokenizer):
    ids = tokenizer.encode("é花x")
    assert len(ids) > 3
    for cut in range(1, len(ids)):
        labels = [-100] * (cut - 1) + ids[cut:] + [-100]
        assert "\ufffd" not in text(make_batch(ids, labels), tokenizer)


def test_first_target_after_a_long_prompt_is_shown():
    cells = [("p", False)] * 500 + [("t", True)] * 20
    short = shorten(cells, 100)
    assert display_width(short) <= 100
    assert ("t", True) in short
    assert short[0] == ("p", False)


def test_wrapping_counts_wide_characters():
    assert wrap([("花", True)] * 7, BRACKETS, 6) == ["⟦花花花⟧", "⟦花花花⟧", "⟦花⟧"]


@pytest.mark.parametrize(
    ("terminal", "no_color", "coloured"),
    [(True, "", True), (True, "1", False), (False, "", False)],
    ids=["terminal", "no-color", "pipe"],
)
def test_colours_only_on_a_terminal(terminal, no_color, coloured, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("NO_COLOR", no_color)
    assert (Highlight.for_stdout().begin == "\033[1;32m") is coloured


def set_up(data: DataModule) -> DataModule:
    data.setup(1)
    return data


def test_pairs_are_shown_as_chosen_and_rejected():
    printed = "\n".join(format_samples(set_up(Pairs(4)), 2, BRACKETS, 80))
    assert re.findall(r"(\d)  (chosen|rejected): \d+ tokens", printed) == [
        ("1", "chosen"), ("1", "rejected"), ("2", "chosen"), ("2", "rejected"),
    ]  # fmt: skip


def test_window_reports_tokens_positions_and_padding():
    batch = make_batch([1, 2, 5, 6, 0, 0], [2, 9, 6, 9, -100, -100], [0, 1, 0, 1, 0, 0])
    row = rows_of(batch)[0]
    assert (row.tokens, row.positions, row.padding) == (6, 6, 2)  # each of the two documents ends in a token without a position
    (head, *_) = format_samples(set_up(Rows(1)), 1, BRACKETS, 80)
    assert re.match(r"1  \d+ tokens in \d+ positions", head)


def test_any_datamodule_with_ids_and_labels_works():
    class Bare(Rows):
        def collate(self, samples: list[Any]) -> Batch:
            return {name: value for name, value in super().collate(samples).items() if name != "position_ids"}

    assert len(format_samples(set_up(Bare(3)), 5, BRACKETS, 80)) >= 6  # three samples


def test_only_assistant_messages_are_highlighted(tokenizer_folder, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]}\n')
    data = set_up(SFT(str(file), str(tokenizer_folder), 128))
    printed = "".join(line.strip() for line in format_samples(data, 1, BRACKETS, 100)[1:])
    highlighted = "".join(re.findall(r"⟦(.*?)⟧", printed))
    assert highlighted.startswith("answer<")
    assert "question" in printed
    assert "question" not in highlighted


def test_pretraining_highlights_all_but_the_first_token_of_a_document(tokenizer_folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "xy"}\n{"text": "zy"}\n')
    data = set_up(Pretrain(str(tmp_path / "a.jsonl"), str(tokenizer_folder), 16))
    head, *body = format_samples(data, 1, BRACKETS, 300)
    assert sorted("".join(body).strip().split("│")) == ["x⟦y<|endoftext|>⟧", "z⟦y<|endoftext|>⟧"]
    assert "a.jsonl:1" in head
