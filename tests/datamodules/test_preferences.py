"""Preferences from files to batches: two rows per pair, the same prompt, answers that are never cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.chat_records import preferences, write

from bumblebee.nn import IGNORE_INDEX
from bumblebee.nn.documents import Documents
from bumblebee.tokenizer.tokenizer import Tokenizer
from bumblebee.training.loader import epoch_order, train_windows
from bumblebee.training.plan import Plan
from datamodules import Preferences
from datamodules.records import RecordError


@pytest.fixture
def make(tokenizer_folder, tmp_path):
    """A function that sets up Preferences on records, with its own cache."""

    def set_up(records: list[dict] | None = None, **options: Any) -> Preferences:
        files = options.pop("files", None) or write(tmp_path / "pairs.jsonl", records or [])
        options = {"tokenizer": str(tokenizer_folder), "max_length": 400, "cache_dir": str(tmp_path / "cache"), **options}
        data = Preferences(files=files, **options)
        data.setup(seed=0)
        return data

    return set_up


def row_of(data: Preferences, record: dict, answer: str) -> tuple[list[int], list[int]]:
    """Ids of (prompt, answer with end of turn) from the chat template, the prompt as for generation."""
    prompt = data.tokenizer.apply_chat_template(record["messages"], add_generation_prompt=True)
    chat = data.tokenizer.chat_template.encode([*record["messages"], record[answer]], None, "last")
    said = [token for token, trained in zip(chat.ids, chat.target_mask, strict=True) if trained]
    return prompt, said


def test_batch_alternates_chosen_and_rejected_rows(make):
    records = preferences(7)
    data = make(records)
    batch = data.collate([data.train[index] for index in range(7)])
    assert batch["index"].tolist() == list(range(7))
    for pair, record in enumerate(records):
        for row, answer in ((2 * pair, "chosen"), (2 * pair + 1, "rejected")):
            prompt, said = row_of(data, record, answer)
            ids = [*prompt, *said]
            length = len(ids) - 1
            assert batch["input_ids"][row, :length].tolist() == ids[:-1]
            assert batch["labels"][row, :length].tolist() == [IGNORE_INDEX] * (len(prompt) - 1) + said
            assert batch["position_ids"][row, :length].tolist() == list(range(length))
            assert (batch["labels"][row, length:] == IGNORE_INDEX).all() and (batch["position_ids"][row, length:] > 0).all()
    assert Documents.find(batch["position_ids"]).one_per_row


def test_margins_are_read_and_checked(make, tmp_path):
    records = preferences(3)
    assert "margin" not in make(records, cache_dir=str(tmp_path / "without")).collate([make(records).train[0]])
    margins = [{}, {"margin": 2}, {"margin": None}]
    data = make([{**record, **each} for record, each in zip(records, margins, strict=True)])
    assert data.collate(list(data.train))["margin"].tolist() == [0, 2, 0]
    with pytest.raises(RecordError, match=r"pairs.jsonl:1: 'margin' must be a number.* not 'much'"):
        make([{**records[0], "margin": "much"}])


def test_width_is_the_longest_row_in_multiples_of_8(make):
    data = make(preferences(9))
    for size in (1, 3):
        samples = [data.train[index] for index in range(size)]
        longest = max(len(inputs) for _, _, *rows in samples for inputs, _ in rows)
        batch = data.collate(samples)
        assert batch["labels"].shape == (2 * size, -(-longest // 8) * 8)
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_batches_have_pairs_of_similar_length(make):
    data = make(preferences(40, longest=60), max_length=2000)
    assert data.lengths.tolist() == [max(len(inputs) for inputs, _ in data.train[i][2:]) for i in range(40)]
    order = epoch_order(40, 1, 0, data.lengths)
    assert (np.diff(data.lengths[order]) >= 0).all()  # one group


# -- too long ------------------------------------------------------------------------------------------------------------

MAX = 150


def rows(data: Preferences, records: list[dict]) -> list[tuple[int, int]]:
    """(tokens of the prompt, tokens of the longer answer) of each record."""
    parts = [[row_of(data, record, answer) for answer in ("chosen", "rejected")] for record in records]
    return [(len(one[0]), max(len(one[1]), len(other[1]))) for one, other in parts]


def test_too_long_pairs_are_dropped_and_counted(make):
    records = preferences(40, longest=60)
    data = make(records, max_length=MAX)
    fitting = [number for number, (prompt, answer) in enumerate(rows(data, records)) if prompt + answer - 1 <= MAX]
    assert 0 < len(fitting) < 40
    assert data.train.samples.tolist() == fitting
    assert data.summary()[f"longer than max_length {MAX}"] == f"{40 - len(fitting)} dropped"


def test_keep_end_truncates_prompts_and_never_answers(make):
    records = preferences(40, longest=60)
    data = make(records, max_length=MAX, too_long="keep_end")
    fitting = [number for number, (_, answer) in enumerate(rows(data, records)) if answer <= MAX]
    assert len(fitting) < 40 and data.train.samples.tolist() == fitting
    cut = 0
    for (_, _, *segments), number in zip(map(data.train.__getitem__, range(len(data.train))), fitting, strict=True):
        kept = []
        for (inputs, labels), answer in zip(segments, ("chosen", "rejected"), strict=True):
            prompt, said = row_of(data, records[number], answer)
            assert labels[labels != IGNORE_INDEX].tolist() == said
            kept.append(inputs[: len(inputs) - len(said) + 1].tolist())
            assert len(inputs) <= MAX and kept[-1] == prompt[-len(kept[-1]) :] and kept[-1]
        assert kept[0] == kept[1]
        cut += len(kept[0]) < len(prompt)
        assert len(kept[0]) == len(prompt) or max(len(inputs) for inputs, _ in segments) == MAX  # no more than has to be
    summary = data.summary()
    assert cut > 0 and summary["prompts cut from the left"] == cut
    assert summary[f"longer than max_length {MAX}"] == f"{40 - len(fitting)} dropped"


def test_no_remaining_samples_is_an_error_with_reasons(make):
    with pytest.raises(ValueError, match=r"^files: none of 5 pairs remains; longer than max_length 8: 5 dropped$"):
        make(preferences(5), max_length=8)


# -- common to all DataModules -------------------------------------------------------------------------------------------


def test_rank_without_pairs_gets_a_batch_without_targets(make):
    data = make(preferences(3))
    first, second = (
        [batch for window in train_windows(data, Plan(3, 1, 1, 2, max_steps=2), 1, rank, 0, 0, False) for batch in window]
        for rank in (0, 1)
    )
    assert all((batch["labels"] != IGNORE_INDEX).any() for batch in [*first, second[0]])
    assert (second[1]["labels"] == IGNORE_INDEX).all() and second[1]["labels"].shape[0] == 2 and len(second[1]["index"]) == 1
    assert sorted(int(batch["index"]) for batch in [*first, second[0]]) == [0, 1, 2]


def test_equal_pairs_are_on_one_side_of_the_split(make):
    records = preferences(20)
    data = make([*records, *records], validation_ratio=0.3)
    assert len(data.held_out) == 12 and len(data.validation) == 12
    assert {number % 20 for number in data.kept} & {number % 20 for number in data.held_out} == set()
    assert data.summary()["held out"] == "12 pairs"


def test_repeated_pairs_have_distinct_indices(make, tmp_path):
    file = write(tmp_path / "twice.jsonl", preferences(3))
    data = make(files=[{"path": file, "weight": 2}])
    batch = data.collate([data.train[index] for index in range(6)])
    assert batch["index"].tolist() == list(range(6))
    assert torch.equal(batch["input_ids"][0::4], batch["input_ids"][2::4])


def test_system_prompt_is_added_to_both_rows(make):
    data = make(preferences(2), system="Be brief.")
    for _, _, *segments in (data.train[0], data.train[1]):
        assert all("Be brief." in data.tokenizer.decode(inputs.tolist()) for inputs, _ in segments)


def test_bad_record_is_named_or_skipped_and_counted(make, tmp_path):
    same = {**preferences(1)[0], "rejected": preferences(1)[0]["chosen"]}
    file = write(tmp_path / "bad.jsonl", [*preferences(2), same])
    with pytest.raises(RecordError, match=r"bad\.jsonl:3: 'chosen' and 'rejected' are equal"):
        make(files=file)
    assert make(files=file, on_bad_record="skip").summary()["bad records skipped"] == 1


def test_origin_of_a_pair_is_its_record(make, tmp_path):
    data = make(preferences(3))
    assert [data.origin(index) for index in range(3)] == [f"{tmp_path / 'pairs.jsonl'}:{line}" for line in (1, 2, 3)]


def test_summary_counts_tokens_of_the_answers(make):
    data = make(preferences(8))
    batch = data.collate([data.train[index] for index in range(8)])
    targets = int((batch["labels"] != IGNORE_INDEX).sum())
    tokens = sum(len(inputs) for index in range(8) for inputs, _ in data.train[index][2:])
    assert data.summary()["answer tokens"] == f"{targets:,} of {tokens:,} ({targets / tokens:.1%})"


TELLTALE = (
    "{{ messages[-1].content | length }}{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)


def test_template_with_answer_dependent_prompt_is_rejected(make, tokenizer_folder, tmp_path):
    folder = tmp_path / "telltale"
    Tokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TELLTALE)
    with pytest.raises(
        RecordError, match=r"pairs\.jsonl:1: the chat template renders the prompt differently before the rejected"
    ):
        make(preferences(3, longest=5), tokenizer=str(folder))
