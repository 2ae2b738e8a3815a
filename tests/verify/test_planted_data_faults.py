"""The data check of ``bumblebee verify`` detects faults of batches and samples, and says what to distrust."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bumblebee import BumblebeeConfig, LanguageModeling, Trainer
from bumblebee.datamodule import DataModule
from bumblebee.model import Bumblebee
from bumblebee.nn import IGNORE_INDEX
from bumblebee.optim import Constant
from bumblebee.recipe import Run
from bumblebee.training import loader
from bumblebee.training.plan import Plan
from bumblebee.verify import check
from bumblebee.verify.check_result import CheckResult
from bumblebee.verify.checks import data_check
from bumblebee.verify.context import Context
from bumblebee.verify.subject import Subject
from bumblebee.verify.verify_options import VerifyOptions
from bumblebee.verify.verify_report import verdict
from datamodules import SFT, Preferences, Pretrain, packing, token_cache
from datamodules import collate as collate_module

pytestmark = pytest.mark.slow

Patch = pytest.MonkeyPatch
TEXTS = ["alpha beta gamma delta " * n for n in (1, 7, 2, 9, 3, 12, 1, 5)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    chats = [[("user", text), ("assistant", text[::-1]), ("user", "more"), ("assistant", text)] for text in TEXTS]
    records = {
        "text": [{"text": text} for text in TEXTS],
        "chat": [{"messages": [{"role": role, "content": content} for role, content in chat]} for chat in chats],
        "pairs": [{"instruction": text, "chosen": "yes " * (n + 1), "rejected": "no"} for n, text in enumerate(TEXTS)],
    }
    for name, lines in records.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def make(files, tokenizer_folder, tmp_path) -> Callable[..., DataModule]:
    def build(kind: type[DataModule] = SFT, name: str = "chat", **options: object) -> DataModule:
        options = {"max_length": 48, **({"too_long": "split"} if kind is SFT else {}), **options}
        return kind(str(files / f"{name}.jsonl"), str(tokenizer_folder), cache_dir=str(tmp_path), **options)

    return build


def run_check(data: DataModule) -> CheckResult:
    data.setup(0)
    with torch.device("meta"):
        model = Bumblebee(BumblebeeConfig(vocab_size=512, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                          num_attention_heads=2, num_key_value_heads=2))  # fmt: skip
    trainer = Trainer(micro_batch_size=3, accumulate=2, device="cpu")
    run = Run(LanguageModeling(model), data, torch.optim.SGD, Constant(warmup_ratio=0.0), trainer, {}, "", seed=0)
    return data_check.run(Context(VerifyOptions(), torch.device("cpu"), Path(), Subject(model.config, Bumblebee, run)))


def failing(result: CheckResult) -> list[str]:
    return [each.name for each in result.measurements if not each.passed]


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        (Pretrain, "text", {}),
        (SFT, "chat", {}),
        (SFT, "chat", {"packing": False}),
        (SFT, "chat", {"too_long": "drop", "max_length": 100}),
        (SFT, "chat", {"too_long": "keep_end", "train_on": "last"}),
        (SFT, "chat", {"too_long": "keep_start"}),
        (Preferences, "pairs", {"max_length": 200}),
        (Preferences, "pairs", {"max_length": 60}),
        (Preferences, "pairs", {"max_length": 60, "too_long": "keep_end"}),
        (Pretrain, "text", {"validation_ratio": 0.3, "deduplicate": True}),
    ],
)
def test_correct_data_passes(kind, name, options, make):
    result = run_check(make(kind, name, **options))
    assert failing(result) == [] and "rows compared" in result.note, result


def test_weighted_files_pass(files, make):
    data = make(Pretrain, "text")
    data.files = [{"path": str(files / "text.jsonl"), "weight": 2.5}]
    assert failing(run_check(data)) == []


# -- faults ------------------------------------------------------------------------------------------------------------


def changed_batch(patch: Patch, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """``collate_rows`` with its result changed in place."""
    original = collate_module.collate_rows

    def wrong(rows, width, pad_token_id):
        batch = original(rows, width, pad_token_id)
        change(batch)
        return batch

    for module in ("datamodules.sft", "datamodules.pretrain", "datamodules.preference"):
        patch.setattr(f"{module}.collate_rows", wrong)


def positions_run_on(patch: Patch) -> None:
    changed_batch(patch, lambda batch: batch["position_ids"].copy_(torch.arange(batch["input_ids"].shape[1])))


def positions_from_one(patch: Patch) -> None:
    changed_batch(patch, lambda batch: batch["position_ids"].add_(1))


def labels_not_shifted(patch: Patch) -> None:
    def change(batch):
        trained = batch["labels"] != IGNORE_INDEX
        batch["labels"][trained] = batch["input_ids"][trained]

    changed_batch(patch, change)


def labels_cross_documents(patch: Patch) -> None:
    """The last label of a document is the first token of the next."""

    def change(batch):
        last = torch.zeros_like(batch["labels"], dtype=torch.bool)
        last[:, :-1] = batch["position_ids"][:, 1:] == 0
        following = batch["input_ids"].roll(-1, 1)
        batch["labels"][last] = following[last]

    changed_batch(patch, change)


def padding_trained(patch: Patch) -> None:
    def change(batch):
        for row, (inputs, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
            end = int((labels != IGNORE_INDEX).nonzero()[-1]) + 1
            batch["labels"][row, end:] = inputs[end:]

    changed_batch(patch, change)


def prompts_trained(patch: Patch) -> None:
    patch.setattr(token_cache.TokenCache, "target_mask", lambda self, begin, end: np.ones(end - begin, dtype=bool))


def mask_off_by_one(patch: Patch) -> None:
    original = token_cache.TokenCache.target_mask
    patch.setattr(token_cache.TokenCache, "target_mask", lambda self, begin, end: original(self, begin - 1, end - 1))


def ignored_labels_counted(patch: Patch) -> None:
    patch.setattr(LanguageModeling, "counts", lambda self, batch: {"loss": batch["labels"].numel()})


def chunks_overlap(patch: Patch) -> None:
    original = packing.split_into_chunks

    def wrong(begins, ends, max_length):
        starts, lengths = original(begins, ends, max_length)
        return np.where(np.isin(starts, begins), starts, starts - 1), lengths

    patch.setattr(packing, "split_into_chunks", wrong)


def last_chunk_lost(patch: Patch) -> None:
    original = packing.best_fit
    patch.setattr(packing, "best_fit", lambda lengths, capacity: original(lengths, capacity)[:-1])


def sample_read_twice(patch: Patch) -> None:
    """At the border between two micro-batches; the sample after it is never read."""
    original = Plan.window

    def wrong(self, step, rank):
        first, *rest = original(self, step, rank)
        return [first, *(type(first)(each.epoch, each.first - 1, each.last - 1) for each in rest)]

    patch.setattr(Plan, "window", wrong)


def order_with_repeats(patch: Patch) -> None:
    original = loader.epoch_order
    patch.setattr(loader, "epoch_order", lambda samples, *args: np.maximum(original(samples, *args), 1 % samples))


FAULTS = [
    (positions_run_on, SFT, "chat", data_check.POSITIONS),
    (positions_run_on, Pretrain, "text", data_check.POSITIONS),
    (positions_from_one, Preferences, "pairs", data_check.POSITIONS),
    (labels_not_shifted, Pretrain, "text", data_check.LABELS),
    (labels_not_shifted, SFT, "chat", data_check.LABELS),
    (labels_cross_documents, Pretrain, "text", data_check.BORDERS),
    (labels_cross_documents, SFT, "chat", data_check.BORDERS),
    (padding_trained, Pretrain, "text", data_check.PADDING),
    (padding_trained, SFT, "chat", data_check.PADDING),
    (padding_trained, Preferences, "pairs", data_check.PADDING),
    (prompts_trained, SFT, "chat", data_check.UNTRAINED),
    (prompts_trained, Preferences, "pairs", data_check.UNTRAINED),
    (mask_off_by_one, SFT, "chat", data_check.LABELS),
    (ignored_labels_counted, SFT, "chat", data_check.COUNT),
    (chunks_overlap, Pretrain, "text", data_check.DOUBLE),
    (last_chunk_lost, Pretrain, "text", data_check.LOST),
    (last_chunk_lost, SFT, "chat", data_check.LOST),
    (sample_read_twice, SFT, "chat", data_check.INPUTS),
    (order_with_repeats, Pretrain, "text", data_check.BATCHES),
]


@pytest.mark.parametrize(
    ("fault", "kind", "name", "measurement"), FAULTS, ids=[f"{fault.__name__}-{kind.__name__}" for fault, kind, *_ in FAULTS]
)
def test_planted_fault_is_detected_and_named(fault, kind, name, measurement, make, monkeypatch):
    fault(monkeypatch)
    result = run_check(make(kind, name, max_length=200 if kind is Preferences else 48))
    assert measurement in failing(result), result
    line = verdict([(check.DATA, result)])
    assert line.startswith("FAIL data: the recipe's batches are not what its files hold") and measurement in line
    assert "no model trained on this data can be trusted" in line


class OwnData(DataModule[torch.Tensor]):
    """A DataModule of a user's, whose samples do not tell where they come from."""

    def __init__(self, shift: int = -1) -> None:
        self.shift = shift

    def setup(self, seed: int) -> None:
        self.train = list(torch.arange(60).view(5, 12))

    def collate(self, samples):
        ids = torch.stack(samples)
        positions = torch.arange(12).expand_as(ids)
        return {"input_ids": ids, "labels": ids.roll(self.shift, 1), "position_ids": positions}


def test_own_datamodule_is_checked_for_what_its_batches_show():
    result = run_check(OwnData())
    assert failing(result) == [] and "OwnData: 5 rows compared, without the files" in result.note
    assert failing(run_check(OwnData(shift=0))) == [data_check.LABELS]
