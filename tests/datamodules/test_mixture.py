"""Mixtures: weights, selection by content, and errors in ``files``."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules import Pretrain
from datamodules.mixture import Mixture
from datamodules.tokenize import text_digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of 40, 20 and 10 different texts."""
    for name, count in (("a", 40), ("b", 20), ("c", 10)):
        texts = [f"the list {name} has {number} of them" for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


@pytest.fixture
def make(folder, tokenizer_folder, monkeypatch):
    """A function that sets up a Pretrain on files of the folder."""
    monkeypatch.chdir(folder)

    def set_up(files, **options) -> Pretrain:
        data = Pretrain(files, str(tokenizer_folder), 32, cache_dir="cache", **options)
        data.setup(seed=0)
        return data

    return set_up


def texts(data: Pretrain, numbers: np.ndarray | None = None) -> Counter[str]:
    cache = data.cache
    chosen = data.epoch_samples if numbers is None else numbers
    return Counter(data.tokenizer.decode(cache.tokens[cache.begins[n] : cache.ends[n]].tolist()) for n in chosen)


def counts(texts: Counter[str]) -> dict[str, list[int]]:
    """Letter of the file -> how often its texts come, sorted."""
    letters: dict[str, list[int]] = {}
    for text, count in texts.items():
        letters.setdefault(text.split()[2], []).append(count)
    return {letter: sorted(numbers) for letter, numbers in sorted(letters.items())}


# -- weights -------------------------------------------------------------------------------------------------------------


def test_weight_is_the_number_of_passes(make):
    per_file = counts(texts(make(["a.jsonl", {"path": "b.jsonl", "weight": 2}, {"path": "c.jsonl", "weight": 0.5}])))
    assert per_file == {"a": [1] * 40, "b": [2] * 20, "c": [1] * 5}


def test_fractional_weight_adds_a_part_of_a_pass(make):
    assert counts(texts(make([{"path": "a.jsonl", "weight": 2.25}]))) == {"a": [2] * 30 + [3] * 10}


def test_weight_of_a_glob_covers_all_its_files(make):
    per_file = counts(texts(make([{"path": "[ab].jsonl", "weight": 0.5}])))
    assert sum(map(len, per_file.values())) == 30 and set(per_file) == {"a", "b"}


def test_fraction_is_selected_by_content(make, folder):
    first = make([{"path": "a.jsonl", "weight": 0.5}])
    lines = (folder / "a.jsonl").read_text().splitlines()
    (folder / "a.jsonl").write_text("\n".join(lines[::-1]))
    second = make([{"path": "a.jsonl", "weight": 0.5}])
    second.setup(seed=7)
    assert texts(first) == texts(second)


def test_weights_share_a_token_cache(make, folder):
    make([{"path": "a.jsonl", "weight": 0.5}])
    make(["a.jsonl"])
    assert len(list((folder / "cache" / "tokens").glob("[!.]*"))) == 1


def test_equal_texts_of_several_entries_are_on_one_side(make, folder):
    (folder / "d.jsonl").write_text((folder / "a.jsonl").read_text())
    data = make(["b.jsonl", {"path": "a.jsonl", "weight": 3}, {"path": "d.jsonl", "weight": 0.5}], validation_ratio=0.3)
    train, held_out = texts(data), texts(data, data.held_out)
    assert train and held_out and not set(train) & set(held_out)
    assert max(held_out.values()) == 2  # once for each file, whatever the weights
    assert max(train.values()) == 4


def test_fraction_is_independent_of_the_held_out_samples(make):
    """Both select by content; with the same order, the fraction would be the neighbours of the held-out samples."""
    data = make([{"path": "a.jsonl", "weight": 0.5}], validation_ratio=0.5)
    ranks = np.argsort(np.argsort(data.cache.digests[data.kept]))
    chosen = ranks[np.isin(data.kept, data.epoch_samples)]
    assert sorted(chosen) != list(range(len(chosen)))


def test_summary_shows_the_mixture(make):
    summary = make(["a.jsonl", {"path": "b.jsonl", "weight": 2}, {"path": "c.jsonl", "weight": 0.5}]).summary()
    assert summary["mix"] == "a.jsonl 40 × 1 = 40, b.jsonl 20 × 2 = 40, c.jsonl 10 × 0.5 = 5"
    assert "mix" not in make(["a.jsonl", "b.jsonl"]).summary()


@given(st.lists(st.floats(0.01, 4), min_size=1, max_size=4), st.integers(1, 60))
def test_entries_have_the_share_of_their_weight(weights, count):
    mix = object.__new__(Mixture)
    mix.entries = [type("Entry", (), {"files": [str(n)], "weight": w})() for n, w in enumerate(weights)]
    sources = np.array([(n, line) for n in range(len(weights)) for line in range(count)])
    digests = np.array([text_digest(str(row)) for row in sources.tolist()], np.uint64)
    chosen = mix.apply_weights(np.arange(len(sources)), sources, digests)
    for number, weight in enumerate(weights):
        times = Counter(chosen[sources[chosen, 0] == number].tolist())
        assert abs(sum(times.values()) - weight * count) <= 0.5 + 1e-6
        assert set(times.values()) <= {int(weight), int(weight) + 1}


# -- parsing -------------------------------------------------------------------------------------------------------------


def test_file_named_twice_is_read_once(make):
    assert counts(texts(make(["a.jsonl", "[ab].jsonl"]))) == {"a": [1] * 40, "b": [1] * 20}
    assert make("*.jsonl").mixture.files == ["a.jsonl", "b.jsonl", "c.jsonl"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            [{"path": "a.jsonl", "wieght": 2}],
            "unknown key 'wieght' in the entry of 'a.jsonl' (did you mean 'weight'?); allowed keys",
        ),
        (
            [{"path": "a.jsonl", "answer": "whole"}],
            "unknown key 'answer' in the entry of 'a.jsonl'; allowed keys: path, weight",
        ),
        ([{"path": "a.jsonl", "weight": 0}], "the weight of 'a.jsonl' must be a number above 0, got 0"),
        ([{"path": "a.jsonl", "weight": -1.5}], "the weight of 'a.jsonl' must be a number above 0, got -1.5"),
        ([{"path": "a.jsonl", "weight": float("inf")}], "the weight of 'a.jsonl' must be a number above 0, got inf"),
        ([{"path": "a.jsonl", "weight": float("nan")}], "the weight of 'a.jsonl' must be a number above 0, got nan"),
        ([{"path": "a.jsonl", "weight": "2"}], "the weight of 'a.jsonl' must be a number above 0, got '2'"),
        ([{"path": "a.jsonl", "weight": True}], "the weight of 'a.jsonl' must be a number above 0, got True"),
        ([{"weight": 2}], "expected a path in each entry, such as {path: data.jsonl, weight: 2}, got {'weight': 2}"),
        ([{"path": ["a.jsonl"]}], "expected a path in each entry"),
        (["a.jsonl", {"path": "*.jsonl", "weight": 2}], "'*.jsonl' and 'a.jsonl' give the same file different weights"),
        ([], "no files given"),
        ([{"path": "d.jsonl"}], "file not found: d.jsonl"),
    ],
)
def test_errors_in_files_are_named(files, message, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=re.escape(message)):
        Mixture(files)
