"""UnpairedPreferences from files to batches: labels, pairs as two examples, and answers of other records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.chat_records import write

from bumblebee.nn import IGNORE_INDEX
from datamodules import UnpairedPreferences
from datamodules.records import RecordError

RECORDS: list[dict[str, Any]] = [
    {"prompt": "How many legs has a bumblebee?", "completion": "Six.", "label": True},
    {
        "prompt": [{"role": "user", "content": "And wings?"}],
        "completion": [{"role": "assistant", "content": "Four wings."}],
        "label": True,
    },
    {"prompt": "And eyes?", "completion": "Two hundred, and a tail.", "label": False},
    {"instruction": "And stings?", "chosen": "One, if it is female.", "rejected": "Seven."},
]


@pytest.fixture
def make(tokenizer_folder: Path, tmp_path: Path) -> Any:
    """A function that sets up UnpairedPreferences on records."""

    def set_up(records: list[dict[str, Any]], **options: Any) -> UnpairedPreferences:
        options = {"tokenizer": str(tokenizer_folder), "max_length": 400, "cache_dir": str(tmp_path / "cache"), **options}
        data = UnpairedPreferences(write(tmp_path / "answers.jsonl", records), **options)
        data.setup(seed=0)
        return data

    return set_up


def texts(data: UnpairedPreferences, options: dict[str, Any] | None = None) -> list[tuple[str, str]]:
    """(prompt, answer) of each row of all examples."""
    batch, decode, rows = data.collate(list(data.train)), data.tokenizer.decode, []
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        begin = next(at for at, label in enumerate(labels) if label != IGNORE_INDEX)
        rows.append((decode(ids[: begin + 1]), decode([label for label in labels if label != IGNORE_INDEX])))
    return rows


def test_labels_and_pairs_become_examples(make: Any) -> None:
    data = make(RECORDS)
    batch = data.collate(list(data.train))
    assert batch["desirable"].tolist() == [True, True, False, True, False]
    assert batch["index"].tolist() == list(range(5))
    own = texts(data)[::2]
    for (prompt, answer), expected in zip(own, ["Six.", "Four wings.", "Two hundred", "One, if", "Seven."], strict=True):
        assert answer.startswith(expected) and expected not in prompt
    assert "stings" in own[3][0] and own[3][0] == own[4][0]
    assert data.origin(4).endswith("answers.jsonl:4")
    assert data.summary()["examples"] == "3 desirable, 2 undesirable"


def test_second_rows_have_answers_of_other_records(make: Any) -> None:
    rows = texts(make(RECORDS))
    own, others = rows[::2], rows[1::2]
    assert [prompt for prompt, _ in others] == [prompt for prompt, _ in own]
    assert sorted(answer for _, answer in others) == sorted(answer for _, answer in own), "each is used once"
    for (prompt, _), (_, answer) in zip(own, others, strict=True):
        assert answer not in [text for question, text in own if question == prompt], "not an answer to the same prompt"
    assert texts(make(RECORDS)) == rows


def test_long_prompts_are_cut_and_answers_are_not(make: Any) -> None:
    long = [*RECORDS, {"prompt": "why " * 60, "completion": "Because.", "label": True}]
    assert len(make(long, max_length=60).train) == 5
    data = make(long, max_length=60, too_long="keep_end")
    batch, whole = data.collate(list(data.train)), texts(make(long))
    assert len(data.train) == 6 and batch["input_ids"].shape[1] <= 64
    assert [answer for _, answer in texts(data)] == [answer for _, answer in whole]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, "no key 'label': true for a good answer"),
        ({"label": "good"}, "'label' must be true or false, not 'good'"),
        ({"chosen": "a", "rejected": "b"}, "'label' belongs to one answer"),
    ],
)
def test_bad_labels_are_refused(change: dict[str, Any], message: str, make: Any) -> None:
    with pytest.raises(RecordError, match=f"answers.jsonl:1: {message}"):
        make([{**RECORDS[0], **change}])
