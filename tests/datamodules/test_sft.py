"""SFT from files to batches: ids and targets equal those of the chat template, packed or padded."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from helpers.chat_folders import THINKING
from helpers.chat_records import conversations, write
from hypothesis import given, settings
from hypothesis import strategies as st

from bumblebee.datamodule import Batch
from bumblebee.model import Bumblebee
from bumblebee.nn import IGNORE_INDEX
from bumblebee.tokenizer.tokenizer import Tokenizer
from bumblebee.training.loader import epoch_order
from datamodules import SFT
from datamodules.records import RecordError

LONG = {"role": "assistant", "content": "of to " * 300}
Row = list[tuple[int, int]]  # (input, label) of each place


@pytest.fixture
def make(tokenizer_folder, tmp_path):
    """A function that sets up an SFT on records, with its own cache."""

    def set_up(records: list[dict] | None = None, **options: Any) -> SFT:
        files = options.pop("files", None) or write(tmp_path / "chats.jsonl", records or [])
        options = {"tokenizer": str(tokenizer_folder), "max_length": 128, "cache_dir": str(tmp_path / "cache"), **options}
        data = SFT(files=files, **options)
        data.setup(seed=0)
        return data

    return set_up


def batches(data: SFT, size: int = 3) -> list[Batch]:
    return [
        data.collate([data.train[index] for index in range(at, min(at + size, len(data.train)))])
        for at in range(0, len(data.train), size)
    ]


def rows_in(batches: list[Batch], pad: int) -> list[Row]:
    """The segments of batches, recovered from the positions, where 0 begins a segment; padding continues the last one."""
    rows: list[Row] = []
    for batch in batches:
        for ids, labels, positions in zip(
            *(batch[name].tolist() for name in ("input_ids", "labels", "position_ids")), strict=True
        ):
            row = list(zip(ids, labels, positions, strict=True))
            while row and row[-1][:2] == (pad, IGNORE_INDEX):
                assert row.pop()[2] > 0  # no segment of its own
            for token, label, position in row:
                if position == 0:
                    rows.append([])
                assert position == len(rows[-1])
                rows[-1].append((token, label))
    return rows


def expected_rows(records: list[dict], tokenizer: Tokenizer, train_on: str = "all") -> list[Row]:
    """The expected rows of all records, from the chat template alone."""
    rows = []
    for chat in [chat for r in records for chat in tokenizer.chat_template.encode_turns(r["messages"], None, train_on)]:
        labels = [token if trained else IGNORE_INDEX for token, trained in zip(chat.ids, chat.target_mask, strict=True)]
        rows.append(list(zip(chat.ids[:-1], labels[1:], strict=True)))
    return rows


def counted(rows: list[Row]) -> Counter[tuple[tuple[int, int], ...]]:
    return Counter(map(tuple, rows))


@settings(max_examples=12)
@given(
    count=st.integers(1, 30), max_length=st.integers(250, 700), packing=st.booleans(), train_on=st.sampled_from(["all", "last"])
)
def test_every_conversation_occurs_once_with_its_targets(
    count, max_length, packing, train_on, tokenizer_folder, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("chats")
    records = conversations(count, longest=15)
    file = write(folder / "c.jsonl", records)
    data = SFT(file, str(tokenizer_folder), max_length, train_on, packing=packing, cache_dir=str(folder))
    data.setup(0)
    assert counted(rows_in(batches(data), data.pad_token_id)) == counted(expected_rows(records, data.tokenizer, train_on))


def test_width_of_packed_and_padded_batches(make):
    assert {tuple(batch["labels"].shape)[1] for batch in batches(make(conversations(30)))} == {128}
    data = make(conversations(30), packing=False)
    for batch in batches(data):
        used = (batch["position_ids"].max(dim=1).values + 1).max()
        assert batch["labels"].shape[1] == -(-int(used) // 8) * 8
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_targets_are_answers_and_end_of_turn(make):
    record = {
        "messages": [
            {"role": "user", "content": "What is it?"},
            {"role": "assistant", "content": "A list."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ]
    }
    for train_on, said in (("all", "A list.<|im_end|>Yes.<|im_end|>"), ("last", "Yes.<|im_end|>")):
        data = make([record], train_on=train_on)
        [batch] = batches(data)
        targets = batch["labels"][batch["labels"] != IGNORE_INDEX].tolist()
        assert data.tokenizer.decode(targets, skip_special_tokens=False) == said


def test_system_is_added_to_conversations_without_one(make):
    asked = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A list."}]
    with_own = [{"role": "system", "content": "Own words."}, *asked]

    def text(**options: Any) -> list[str]:
        data = make([{"messages": asked}, {"messages": with_own}], packing=False, max_length=500, **options)
        return [data.tokenizer.decode(data.train[index][0][0].tolist()) for index in range(2)]

    none, default = text(), text(system="Be brief.")
    assert "Be brief." in default[0] and "Be brief." not in default[1] and "Own words." in default[1]
    assert "Be brief." not in none[0] and none[1] == default[1]


def test_turns_that_the_template_rewrites_are_sequences_of_their_own(make, tokenizer_folder, tmp_path):
    Tokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder := tmp_path / "thinking")
    (folder / "chat_template.jinja").write_text(THINKING)
    records = []
    for number in range(12):
        answer = {"role": "assistant", "content": f"<think>\nnumber {number}\n</think>\nfour"}
        records.append({"messages": [{"role": "user", "content": "2 + 2?"}, answer] * (1 + number % 3)})
    options = {"tokenizer": str(folder), "max_length": 300, "files": write(tmp_path / "t.jsonl", [*records, records[5]])}
    data = make(packing=False, deduplicate=True, validation_ratio=0.25, **options)
    lines = [[data.cache.sources[sample, 1] for sample in side] for side in (data.kept, data.held_out)]
    assert sorted(lines[0] + lines[1]) == list(range(1, 13)) and len(lines[1]) == 3
    for side, dataset in zip(lines, (data.train, data.validation), strict=True):
        origins = Counter(int(dataset.origin(index).rpartition(":")[2]) for index in range(len(dataset)))
        assert origins == {line: 1 + (line - 1) % 3 for line in side}
    packed = make(**options)
    expected = expected_rows([*records, records[5]], packed.tokenizer)
    assert counted(rows_in(batches(packed), packed.pad_token_id)) == counted(expected)
    said = f"{len(expected)}: the chat template renders earlier turns differently when others follow"
    assert len(expected) == 27 and packed.summary()["sequences"] == said and packed.summary()["conversations"] == 13


# -- too long ------------------------------------------------------------------------------------------------------------


def long_and_short() -> list[dict]:
    return [*conversations(10, longest=8), *conversations(10, longest=150, seed=1)]


def test_too_long_conversations_are_dropped_and_counted(make):
    records = long_and_short()
    data = make(records)
    fitting = [row for row in expected_rows(records, data.tokenizer) if len(row) <= 128]
    assert 0 < len(fitting) < len(records)
    assert counted(rows_in(batches(data), data.pad_token_id)) == counted(fitting)
    assert data.summary()["longer than max_length 128"] == f"{len(records) - len(fitting)} dropped"


@pytest.mark.parametrize(("too_long", "part"), [("keep_start", slice(0, 128)), ("keep_end", slice(-128, None))])
def test_too_long_conversations_keep_one_end(too_long, part, make):
    records = long_and_short()
    data = make(records, too_long=too_long)
    parts = [row[part] for row in expected_rows(records, data.tokenizer)]
    useful = [row for row in parts if any(label != IGNORE_INDEX for _, label in row)]
    assert counted(rows_in(batches(data), data.pad_token_id)) == counted(useful)
    assert data.summary().get("without a target") == (
        f"{len(parts) - len(useful)} dropped" if len(parts) > len(useful) else None
    )


@pytest.mark.parametrize("packing", [True, False])
def test_split_trains_every_target_once(packing, make):
    records = long_and_short()
    data = make(records, too_long="split", packing=packing)
    parts = [row[at : at + 128] for row in expected_rows(records, data.tokenizer) for at in range(0, len(row), 128)]
    useful = [row for row in parts if any(label != IGNORE_INDEX for _, label in row)]
    assert counted(rows_in(batches(data), data.pad_token_id)) == counted(useful)


def test_samples_without_targets_are_dropped_and_counted(make):
    question = {"role": "user", "content": "of to " * 200}
    answer = {"role": "assistant", "content": "None."}
    data = make([*conversations(3, longest=5), {"messages": [question, answer]}], too_long="keep_start", max_length=400)
    assert data.summary()["longer than max_length 400"] == "1 cut at the end"
    assert data.summary()["without a target"] == "1 dropped"


def test_no_remaining_samples_is_an_error_with_reasons(make):
    with pytest.raises(ValueError, match=r"^files: none of 5 conversations remains; longer than max_length 8: 5 dropped$"):
        make(conversations(5), max_length=8)
    with pytest.raises(
        ValueError, match=r"^validation_files: none of 10 conversations remains; longer than max_length 400: 10 "
    ):
        make(conversations(3, longest=2), max_length=400, validation_files=_long_file(make))


def _long_file(make) -> str:
    folder = make(conversations(3, longest=2), max_length=400).cache_dir.parent
    return write(folder / "long.jsonl", [{"messages": [*r["messages"][:1], LONG]} for r in conversations(10)])


# -- the model sees no difference ----------------------------------------------------------------------------------------


def gradients(model: Bumblebee, batches: list[Batch]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    total = sum(model(b["input_ids"], position_ids=b["position_ids"], labels=b["labels"]).double().sum() for b in batches)
    total.backward()
    return total.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_packing_does_not_change_losses_and_gradients(make, tiny):
    """Sums over all targets: packed, padded in batches, and one at a time without padding."""
    torch.manual_seed(0)
    model = Bumblebee(tiny())
    records = conversations(12, longest=20)
    packed, padded = make(records, max_length=200), make(records, max_length=200, packing=False)
    assert len(packed.train) < len(padded.train)
    alone = [
        {
            "input_ids": torch.from_numpy(inputs)[None],
            "labels": torch.from_numpy(labels)[None],
            "position_ids": torch.arange(len(inputs))[None],
        }
        for [(inputs, labels)] in (padded.train[index] for index in range(len(padded.train)))
    ]
    loss, expected = gradients(model, alone)
    for batch_list in (batches(packed), batches(padded, 4)):
        ours, grads = gradients(model, batch_list)
        torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
        for grad, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5 * float(other.abs().max() + 1))


# -- efficiency and order ------------------------------------------------------------------------------------------------


def test_windows_are_full_for_realistic_lengths(make):
    """500 conversations of 30 to 500 tokens, log-normally distributed like instruction data."""
    random = np.random.default_rng(0)
    records = []
    for number in range(500):
        words = " ".join(random.choice(["if", "is", "to", "of"], int(np.clip(random.lognormal(3.5, 0.8), 1, 300))))
        messages = [{"role": "user", "content": str(number)}, {"role": "assistant", "content": words}]
        records.append({"messages": messages})
    for max_length in (512, 1024, 2048):
        data = make(records, max_length=max_length, too_long="keep_start")
        assert data.train.windows.efficiency > 0.95, max_length


def test_padded_batches_have_similar_lengths(make):
    data = make(conversations(300), packing=False, max_length=1000)
    assert data.lengths is not None and data.lengths.tolist() == [len(data.train[i][0][0]) for i in range(len(data.train))]

    def padding(order: np.ndarray) -> float:
        batch_list = [data.collate([data.train[int(i)] for i in order[at : at + 4]]) for at in range(0, len(order), 4)]
        return 1 - data.lengths.sum() / sum(batch["labels"].numel() for batch in batch_list)

    assert padding(epoch_order(300, 1, 0, data.lengths)) < 0.06 < padding(epoch_order(300, 1, 0))
    assert make(conversations(3), max_length=1000).lengths is None


# -- common to all DataModules -------------------------------------------------------------------------------------------


def test_options_that_change_ids_are_in_the_key(make, tmp_path):
    def caches() -> int:
        return len(list((tmp_path / "cache" / "tokens").glob("[!.]*")))

    records = conversations(4, longest=5)
    make(records, max_length=300)
    make(records, max_length=200, packing=False, too_long="split", validation_ratio=0.3, deduplicate=True)
    assert caches() == 1
    for option in ({"system": "Be brief."}, {"train_on": "last"}, {"on_bad_record": "skip"}):
        make(records, max_length=300, **option)
    assert caches() == 4


def test_chat_template_is_in_the_key(make, tokenizer_folder, tmp_path):
    folder = tmp_path / "other"
    Tokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    records = conversations(2, longest=5)
    first = make(records, tokenizer=str(folder), max_length=500)
    text = first.tokenizer.chat_template.sources["default"]
    (folder / "chat_template.jinja").write_text(text.replace("<|im_start|>' + message", "<|im_start|>the ' + message"))
    other = make(records, tokenizer=str(folder), max_length=500)
    assert first.cache.folder != other.cache.folder


def test_whitespace_variants_are_duplicates(make):
    spaced = [
        {"messages": [{**message, "content": " " + message["content"].replace(" ", "\n ")} for message in record["messages"]]}
        for record in conversations(20, longest=10)
    ]
    records = [*conversations(20, longest=10), *spaced]
    assert make(records, deduplicate=True, max_length=900).summary()["duplicates left out"] == 20
    data = make(records, validation_ratio=0.25, max_length=900)
    assert {number % 20 for number in data.kept} & {number % 20 for number in data.held_out} == set()


def test_different_conversations_are_not_duplicates(make):
    asked = {"role": "user", "content": "a b"}
    records = [
        {"messages": [asked, {"role": "assistant", "content": "c"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]},
        {
            "messages": [
                {"role": "system", "content": "a"},
                {"role": "user", "content": "b"},
                {"role": "assistant", "content": "c"},
            ]
        },
    ]
    assert make(records, deduplicate=True).summary()["duplicates left out"] == 0


def test_bad_record_is_named_or_skipped_and_counted(make, tmp_path):
    records = [*conversations(3, longest=3), {"messages": []}, {"text": "no chat"}]
    file = write(tmp_path / "bad.jsonl", records)
    with pytest.raises(RecordError, match=r"bad\.jsonl:4: 'messages' is empty"):
        make(files=file)
    assert make(files=file, max_length=500, on_bad_record="skip").summary()["bad records skipped"] == 2


def test_unusable_template_is_rejected_before_reading(make, tokenizer_folder, tmp_path):
    folder = tmp_path / "plain"
    Tokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}")
    with pytest.raises(ValueError, match="plain") as caught:
        make([{"bad": "record"}], tokenizer=str(folder), on_bad_record="skip")
    assert not isinstance(caught.value, RecordError)


def test_summary_counts_match_the_batches(make):
    data = make(conversations(20, longest=10), validation_ratio=0.2, max_length=300)
    summary = data.summary()
    batch_list = batches(data)
    targets = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batch_list)
    tokens = sum(len(row) for row in rows_in(batch_list, data.pad_token_id))
    assert summary["conversations"] == 16
    assert summary["trained tokens"] == f"{targets:,} of {tokens:,} ({targets / tokens:.1%})"
    share = tokens / sum(batch["labels"].numel() for batch in batch_list)
    assert summary["windows"] == f"{len(data.train)} of 300 tokens, {share:.1%} full"
    assert re.match(r"4 conversations, [\d,]+ trained tokens", summary["held out"])


def test_origin_of_a_sample_is_its_records(make, tmp_path):
    data = make(conversations(9, longest=5), packing=False, max_length=400)
    assert [data.origin(index) for index in range(9)] == [f"{tmp_path / 'chats.jsonl'}:{line}" for line in range(1, 10)]
    packed = make(conversations(9, longest=5), max_length=400)
    named = [word for index in range(len(packed.train)) for word in packed.origin(index).split()]
    assert sorted(named) == [f"{tmp_path / 'chats.jsonl'}:{line}" for line in range(1, 10)]


def test_record_that_cannot_be_rendered_is_a_bad_record(make, tokenizer_folder, tmp_path):
    folder = tmp_path / "without_tools"
    Tokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    turns = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(turns)
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
    plain, with_tools = conversations(2, longest=5)
    records = [plain, {**with_tools, "tools": [tool]}]
    options = {"tokenizer": str(folder), "max_length": 900}
    with pytest.raises(RecordError, match=r"chats\.jsonl:2: .*omits the tools \('get_weather'\)"):
        make(records, **options)
    assert make(records, on_bad_record="skip", **options).summary()["bad records skipped"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_length": 0}, "max_length must be at least 1, got 0"), ({"validation_ratio": 1.0}, "validation_ratio must be in")],
)
def test_numbers_out_of_range_are_rejected_with_their_value(options, message):
    with pytest.raises(ValueError, match=message):
        SFT("files", "tokenizer", **options)


def test_holding_out_everything_is_rejected(make):
    with pytest.raises(ValueError, match="no text to train on in .*: validation_ratio holds out all of it .4 conversations."):
        make(conversations(1, longest=5) * 4, validation_ratio=0.1, max_length=900)
