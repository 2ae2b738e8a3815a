"""Prompts: rendered up to the answer, with their records; long and held-out ones; errors name file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bumblebee.training.loader import train_windows
from bumblebee.training.plan import Plan
from datamodules import Prompts


@pytest.fixture
def file(tmp_path: Path) -> Path:
    lines = [{"prompt": f"{a} + 1?", "answer": a + 1} for a in range(20)]
    lines.append({"messages": [{"role": "user", "content": "long " * 100}], "answer": 0})
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def prompts(file: Path, folder: Path, **options: object) -> Prompts:
    data = Prompts(str(file), str(folder), **{"max_length": 64, **options})
    data.setup(0)
    return data


def test_a_batch_holds_prompts_up_to_the_answer_and_no_targets(file, tokenizer_folder):
    data = prompts(file, tokenizer_folder)
    assert len(data.train) == 20 and data.dropped == 1
    assert data.train[3].record == {"prompt": "3 + 1?", "answer": 4}
    assert data.train[3].question == "3 + 1?"
    assert data.origin(3) == f"{file}:4"
    batch = data.collate(data.train[9:11])
    assert batch["index"].tolist() == [9, 10]
    assert (batch["labels"] == -100).all()
    for row, length in zip(batch["input_ids"], batch["lengths"].tolist(), strict=True):
        text = "".join(data.tokenizer.token_bytes[token].decode() for token in row[:length].tolist())
        assert text.endswith("1?\nassistant\n")  # special tokens have no text
    assert data.without_targets(batch)["index"].tolist() == [-1, -1]


def test_held_out_prompts_are_chosen_by_content(file, tokenizer_folder):
    data = prompts(file, tokenizer_folder, validation_ratio=0.25)
    assert len(data.validation) == 5 and len(data.train) == 15
    shuffled = file.with_name("shuffled.jsonl")
    shuffled.write_text("\n".join(reversed(file.read_text().splitlines())), encoding="utf-8")
    again = prompts(shuffled, tokenizer_folder, validation_ratio=0.25)
    assert {sample.question for sample in again.validation} == {sample.question for sample in data.validation}
    files = prompts(file, tokenizer_folder, validation_files=str(shuffled))
    assert {sample.index for sample in files.train}.isdisjoint(sample.index for sample in files.validation)


def test_fingerprint_depends_on_records_and_their_order(file, tokenizer_folder):
    first = prompts(file, tokenizer_folder).fingerprint()
    assert prompts(file, tokenizer_folder).fingerprint() == first
    file.write_text(file.read_text().replace('"answer": 4}', '"answer": 5}'), encoding="utf-8")
    assert prompts(file, tokenizer_folder).fingerprint() != first


def test_easy_first_orders_by_pass_rate_on_any_ranks_and_resumed(file, tokenizer_folder):
    rates = [None if number % 5 == 4 else number % 5 / 4 for number in range(20)]
    lines = [{"prompt": f"{number}?", "rate": rate} for number, rate in enumerate(rates)]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    data = prompts(file, tokenizer_folder, pass_rate_key="rate", order="easy_first")

    def steps(ranks: int, seed: int = 0, first: int = 0) -> list[list[int]]:
        plan = Plan.of(20, 4 // ranks, 1, ranks, 2, None)
        windows = [train_windows(data, plan, seed, rank, first, 0, False) for rank in range(ranks)]
        shares = zip(*windows, strict=True)
        return [[index for window in step for batch in window for index in batch["index"].tolist()] for step in shares]

    whole = steps(1)
    for epoch in (whole[:5], whole[5:]):
        assert [rates[index] for step in epoch for index in step] == [
            rate for rate in (0.75, 0.5, 0.25, 0.0, None) for _ in range(4)
        ]
    assert sorted(whole[0]) == sorted(whole[5]) and (whole[:5] != whole[5:]) and whole != steps(1, seed=1)
    assert steps(2) == whole and steps(2, first=3) == whole[3:]
    assert data.fingerprint() != prompts(file, tokenizer_folder, pass_rate_key="rate").fingerprint()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ('{"prompt": "a"}\n{"text": "b"}', {}, r"questions.jsonl:2: expected exactly one of the keys"),
        ('{"prompt": "' + "long " * 100 + '"}', {}, r"there is no prompt in .*; longer than max_length 64: 1 dropped"),
        ('{"prompt": "' + "long " * 100 + '"}', {"too_long": "stop"}, r"questions.jsonl:1: the prompt has \d+ tokens"),
        ('{"prompt": "a"}', {"validation_ratio": 0.5}, "validation_ratio holds out all 1 prompts"),
        ('{"prompt": "a"}', {"max_length": 0}, "max_length must be at least 1, got 0"),
        ('{"prompt": "a"}', {"order": "easy_first"}, "order: easy_first needs pass_rate_key"),
    ],
)
def test_files_and_options_that_cannot_be_used_are_named(text, options, message, file, tokenizer_folder):
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        prompts(file, tokenizer_folder, **options)
