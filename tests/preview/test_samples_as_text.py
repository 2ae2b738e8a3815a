"""Samples as text: what is marked is what is trained."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch
from helpers.training_runs import Pairs, Rows

from bumblebee.datamodule import Batch, DataModule
from bumblebee.preview.sample_text import Marks, cells, columns, lines, rows, shortened, shown
from bumblebee.tokenizer.tokenizer import Tokenizer
from datamodules import SFT, Pretrain

MARKS = Marks("⟦", "⟧")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.from_pretrained(tokenizer_folder)


def batch(ids: list[int], labels: list[int], positions: list[int] | None = None) -> Batch:
    made = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
    return made if positions is None else {**made, "position_ids": torch.tensor([positions])}


def text(of: Batch, tokenizer: Tokenizer | None = None) -> str:
    return "".join(lines(cells(rows(of)[0], tokenizer), MARKS, 10_000))


def test_a_token_is_marked_where_the_position_before_is_to_predict_it():
    assert text(batch([1, 2, 3, 4], [-100, 3, 4, -100])) == "1 2 ⟦3 4 ⟧"


def test_a_label_behind_the_row_is_shown():
    assert text(batch([1, 2], [2, 9])) == "1 ⟦2 9 ⟧"


def test_packed_texts_are_kept_apart_and_keep_their_last_label():
    packed = batch([1, 2, 5, 6], [2, 9, 6, 9], [0, 1, 0, 1])
    assert text(packed) == "1 ⟦2 9 ⟧│5 ⟦6 9 ⟧"


@pytest.mark.parametrize("positions", [None, [0, 1, 2, 0, 0, 0]])
def test_padding_is_counted_and_not_shown(positions):
    row = rows(batch([1, 2, 7, 7, 7, 7], [2, 7, -100, -100, -100, -100], positions))[0]
    assert row.padding == 3
    assert row.tokens == 3


def test_padding_with_the_token_that_ends_a_packed_text_is_not_taken_for_it():
    row = rows(batch([1, 2, 7, 7, 7], [2, 7, -100, -100, -100], [0, 1, 0, 0, 0]))[0]
    assert (row.tokens, row.padding) == (3, 3)  # the trained 7 is a label alone


def test_special_tokens_and_ends_of_lines_are_visible(tokenizer):
    ids = [*tokenizer.encode("a\nb"), tokenizer.eos_token_id]
    assert text(batch(ids, [*ids[1:], -100]), tokenizer).replace("⟦", "").replace("⟧", "") == "a⏎b<|endoftext|>"


def test_a_character_of_several_tokens_is_whole(tokenizer):
    ids = tokenizer.encode("é花x")
    assert len(ids) > 3
    for cut in range(1, len(ids)):
        labels = [-100] * (cut - 1) + ids[cut:] + [-100]
        assert "\ufffd" not in text(batch(ids, labels), tokenizer)


def test_the_first_trained_token_is_shown_behind_a_long_prompt():
    found = [("p", False)] * 500 + [("t", True)] * 20
    short = shortened(found, 100)
    assert columns(short) <= 100
    assert ("t", True) in short
    assert short[0] == ("p", False)


def test_lines_are_as_wide_as_they_may_be_with_wide_characters():
    assert lines([("花", True)] * 7, MARKS, 6) == ["⟦花花花⟧", "⟦花花花⟧", "⟦花⟧"]


@pytest.mark.parametrize(("terminal", "no_color", "coloured"), [(True, "", True), (True, "1", False), (False, "", False)])
def test_colours_are_for_terminals_alone(terminal, no_color, coloured, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("NO_COLOR", no_color)
    assert (Marks.of_terminal().begin == "\033[1;32m") is coloured


def ready(data: DataModule) -> DataModule:
    data.setup(1)
    return data


def test_pairs_are_shown_as_chosen_and_rejected():
    found = "\n".join(shown(ready(Pairs(4)), 2, MARKS, 80))
    assert re.findall(r"(\d)  (chosen|rejected): \d+ tokens", found) == [
        ("1", "chosen"), ("1", "rejected"), ("2", "chosen"), ("2", "rejected"),
    ]  # fmt: skip


def test_a_datamodule_of_ones_own_needs_no_more_than_ids_and_labels():
    class Bare(Rows):
        def collate(self, samples: list[Any]) -> Batch:
            return {name: value for name, value in super().collate(samples).items() if name != "position_ids"}

    assert len(shown(ready(Bare(3)), 5, MARKS, 80)) >= 6  # three samples


def test_only_the_assistants_words_are_marked_in_conversations(tokenizer_folder, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]}\n')
    data = ready(SFT(str(file), str(tokenizer_folder), 128))
    found = "".join(line.strip() for line in shown(data, 1, MARKS, 100)[1:])
    marked = "".join(re.findall(r"⟦(.*?)⟧", found))
    assert marked.startswith("answer<")
    assert "question" in found
    assert "question" not in marked


def test_a_window_of_pretraining_is_marked_but_for_each_texts_first_token(tokenizer_folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "xy"}\n{"text": "zy"}\n')
    data = ready(Pretrain(str(tmp_path / "a.jsonl"), str(tokenizer_folder), 16))
    found = shown(data, 1, MARKS, 300)
    assert sorted("".join(found[1:]).strip().split("│")) == ["x⟦y<|endoftext|>⟧", "z⟦y<|endoftext|>⟧"]
    assert "a.jsonl:1" in found[0]
