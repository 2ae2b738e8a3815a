"""Worker processes: same cache as one process, less memory than data, and killed processes."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bumblebee.tokenizer.tokenizer import Tokenizer
from datamodules import worker_pool
from datamodules.record_files import read
from datamodules.records import Record, RecordError
from datamodules.token_cache import TokenCache, write_token_cache
from datamodules.tokenize import TextTokenizer
from datamodules.worker_pool import tokenize_batches, worker_count

SCRIPT = Path(__file__).parents[1] / "helpers" / "cache_build.py"
ROOT = Path(__file__).parents[2]


class Slow(TextTokenizer):
    """Takes longer for earlier batches, so that later ones finish first."""

    multithreaded = False

    def tokenize(self, records):
        time.sleep(0.2 / (1 + records[0].line))
        if any(record.value.get("text") == "die" for record in records):
            os.kill(os.getpid(), signal.SIGKILL)
        if any(record.value.get("text") == "break" for record in records):
            raise ZeroDivisionError("our own mistake")
        return super().tokenize(records)


@pytest.fixture(scope="module")
def encoder(tokenizer_folder) -> Slow:
    return Slow(str(tokenizer_folder), Tokenizer.from_pretrained(tokenizer_folder))


def records(count: int, bad: dict[int, str] | None = None) -> list[Record | RecordError]:
    lines = [(bad or {}).get(number, f"record number {number}") for number in range(count)]
    return [Record("a.jsonl", number, {"text": text} if text else {"txt": ""}) for number, text in enumerate(lines)]


def batched(items: list, size: int = 5) -> list[list]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def written(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.slow
def test_workers_write_the_same_cache_as_one_process(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.worker_pool.BATCH_RECORDS", 7)
    bad = {3: "", 40: "", 41: ""}
    for processes in (1, 3):
        write_token_cache(tmp_path / str(processes), iter(records(60, bad)), encoder, ["a.jsonl"], True, False, processes)
    assert written(tmp_path / "1") == written(tmp_path / "3")
    cache = TokenCache(tmp_path / "3")
    assert cache.sources[:, 1].tolist() == [number for number in range(60) if number not in bad]
    assert cache.about["bad_records"] == 3


@pytest.mark.slow
def test_first_bad_record_in_a_worker_is_raised(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.worker_pool.BATCH_RECORDS", 7)
    with pytest.raises(RecordError, match=r"^a\.jsonl:30: no key 'text'; the record's keys: 'txt'$"):
        write_token_cache(tmp_path / "c", iter(records(60, {30: "", 31: "", 59: ""})), encoder, ["a.jsonl"], False, False, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_batches_before_a_read_error_are_yielded_first(encoder):
    def breaking():
        yield from batched(records(20))
        raise RecordError("a.jsonl", 21, "the file is truncated")

    seen = []
    with pytest.raises(RecordError, match="truncated"):
        for items, block in tokenize_batches(encoder, breaking(), 2):
            seen += [item.line for item in items]
            assert len(block.lengths) == len(items)
    assert seen == list(range(20))


@pytest.mark.slow
def test_worker_errors_are_raised_in_the_parent(encoder):
    with pytest.raises(ValueError, match="was killed by signal 9; a common reason is too little memory"):
        list(tokenize_batches(encoder, batched(records(60, {30: "die"})), 2))
    with pytest.raises(ZeroDivisionError, match="our own mistake"):
        list(tokenize_batches(encoder, batched(records(60, {30: "break"})), 2))


@pytest.mark.slow
def test_workers_exit_when_the_consumer_stops_early(encoder):
    before = children(os.getpid())
    blocks = tokenize_batches(encoder, batched(records(60)), 2)
    next(blocks)
    assert len(children(os.getpid()) - before) >= 2
    blocks.close()
    assert len(children(os.getpid()) - before) <= 1  # ps itself


def test_workers_are_used_only_if_they_are_faster(encoder, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(64), raising=False)
    assert worker_count(encoder, worker_pool.MIN_BYTES - 1) == 1
    assert worker_count(encoder, worker_pool.MIN_BYTES) == worker_pool.MAX_WORKERS
    threaded = TextTokenizer(encoder.folder, encoder.tokenizer)
    assert worker_count(threaded, 10**12) == 1  # the library's threads do it
    monkeypatch.setattr(Slow, "__module__", "__main__")
    assert worker_count(encoder, 10**12) == 1  # another process could not import it


# -- processes that build ------------------------------------------------------------------------------------------------


def start(folder: Path, tokenizer: Path, megabytes: int, file: Path, processes: int = 1) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAYON_NUM_THREADS": "1"}
    words = [sys.executable, str(SCRIPT), str(folder), str(tokenizer), str(megabytes), str(file), str(processes)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_cache_may_be_larger_than_memory(tokenizer_folder, tmp_path):
    """100 MB of records and 80 MB of tokens, with less memory than either."""
    line = json.dumps({"text": "the quick brown fox " * 30}) + "\n"
    count, megabytes = 160_000, 60
    with gzip.open(tmp_path / "large.jsonl.gz", "wt", compresslevel=1) as file:
        for _ in range(count // 1000):
            file.write(line * 1000)
    done = start(tmp_path / "c", tokenizer_folder, megabytes, tmp_path / "large.jsonl.gz")
    out, err = done.communicate(timeout=280)
    assert done.returncode == 0, err[-2000:]
    samples, _, tokens = map(int, out.split()[1:])
    assert samples == count
    assert (tmp_path / "c" / "tokens.bin").stat().st_size == 2 * tokens > megabytes * 2**20
    assert len(line) * count > megabytes * 2**20


@pytest.mark.slow
def test_one_text_needs_a_small_multiple_of_its_size(tokenizer_folder, tmp_path):
    """A document of 6 MB; encoded at once, it would need more than 700 MB."""
    text = "The quick brown fox jumps over the lazy dog, again and again.\n" * 100_000
    (tmp_path / "large.txt").write_text(text)
    done = start(tmp_path / "c", tokenizer_folder, 150, tmp_path / "large.txt")
    out, err = done.communicate(timeout=280)
    assert done.returncode == 0, err[-2000:]
    tokens = int(out.split()[-1])
    line = Tokenizer.from_pretrained(tokenizer_folder).encode(text[: len(text) // 100])
    assert tokens == 100 * len(line) + 1  # and the end of the text


def children(parent: int) -> set[int]:
    pids = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True).stdout.split()
    return {int(pid) for pid in pids}


def is_gone(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_write_is_cleaned_up_and_repeated(processes, tokenizer_folder, tmp_path):
    caches = tmp_path / "caches"
    file, other = tmp_path / "texts.jsonl", tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps({"text": f"text number {n} of very many"}) + "\n" for n in range(60_000)))
    other.write_text('{"text": "another"}\n')
    killed = start(caches / "c", tokenizer_folder, 0, file, processes)
    assert killed.stdout is not None and killed.stdout.readline() == "begins\n"
    while not (tokens := caches / ".c.partial" / "tokens.bin").is_file() or not tokens.stat().st_size:
        assert killed.poll() is None, "too quick to be killed"
        time.sleep(0.005)
    workers = children(killed.pid)
    assert len(workers) == (processes if processes > 1 else 0)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    deadline = time.monotonic() + 20
    while not all(map(is_gone, workers)):  # their input has ended
        assert time.monotonic() < deadline, "workers outlive the process that started them"
        time.sleep(0.05)
    assert tokens.exists() and not (caches / "c").exists()

    second = start(caches / "d", tokenizer_folder, 0, other)  # of other files: cleans up, and does not wait for the dead
    assert second.communicate(timeout=60)[0].split()[1:2] == ["1"]
    assert not tokens.exists()
    third = start(caches / "c", tokenizer_folder, 0, file)
    assert third.communicate(timeout=120)[0].split()[1:2] == ["60000"]
    write_token_cache(tmp_path / "alone", read(str(file)), _encoder(tokenizer_folder), [str(file)], False, False)
    assert written(caches / "c") == written(tmp_path / "alone")
    assert np.all(np.diff(TokenCache(caches / "c").ends) > 0)


def _encoder(folder: Path) -> TextTokenizer:
    return TextTokenizer(str(folder), Tokenizer.from_pretrained(folder))
