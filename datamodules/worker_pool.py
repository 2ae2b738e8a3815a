"""Worker processes that tokenize batches of records, in the order of the records.

A worker is a new interpreter that does not run the user's script again: ``fork`` would copy a parent that may have threads, and
``multiprocessing``'s ``spawn`` imports the main module. It reads pickles from stdin, replies on stdout, and exits when stdin is
closed, so no worker survives its parent, even if that is killed. In the parent, one thread serves each worker.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from datamodules.records import Record, RecordError
from datamodules.tokenize import RecordTokenizer, TokenizedBatch

RecordBatch = list[Record | RecordError]

BATCH_RECORDS, BATCH_CHARACTERS = 1024, 1 << 19  # a batch ends at either limit
MAX_WORKERS = 16  # with more, reading the files in the parent is the bottleneck
MIN_BYTES = 2_000_000  # of files; less is tokenized faster than workers start
ENTRY_POINT = "from datamodules.worker_pool import worker_main; worker_main()"


def batched(items: Iterable[Record | RecordError]) -> Iterator[RecordBatch]:
    """Group records into batches. If ``items`` raises, the records before the error are yielded first."""
    batch: RecordBatch = []
    size = 0
    try:
        for item in items:
            batch.append(item)
            size += _characters(item)
            if len(batch) == BATCH_RECORDS or size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    except RecordError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _characters(item: Record | RecordError) -> int:
    values = item.value.values() if isinstance(item, Record) else ()
    return sum(len(value) for value in values if isinstance(value, str))


def tokenize_batches(
    tokenizer: RecordTokenizer, batches: Iterable[RecordBatch], workers: int
) -> Iterator[tuple[RecordBatch, TokenizedBatch]]:
    """Yield each batch with its tokens, in order.

    If ``batches`` raises, the batches before the error are yielded first.

    Args:
        tokenizer: sent to each worker.
        batches: read a few batches ahead.
        workers: number of processes; with 1, tokenizes in this process.

    Raises:
        ValueError: a worker was killed.
    """
    if workers == 1:
        yield from ((batch, tokenizer.tokenize_batch(batch)) for batch in batches)
        return
    pool = _Pool(tokenizer, workers)
    try:
        yield from pool.run(iter(batches))
    finally:
        pool.close()


def worker_count(tokenizer: RecordTokenizer, size: int) -> int:
    """How many workers to use for ``size`` bytes of files: one per core, or 1 if they would not be faster.

    A class that is defined in the user's script cannot be imported by a worker.
    """
    if tokenizer.multithreaded or size < MIN_BYTES or type(tokenizer).__module__ == "__main__":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, cores)


class _Pool:
    def __init__(self, tokenizer: RecordTokenizer, workers: int) -> None:
        self._workers = [_Worker(tokenizer) for _ in range(workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers)

    def run(self, batches: Iterator[RecordBatch]) -> Iterator[tuple[RecordBatch, TokenizedBatch]]:
        pending: deque[tuple[RecordBatch, Future[TokenizedBatch]]] = deque()
        failure: Exception | None = None
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:
                failure = error
                break
            if batch is None:
                break
            pending.append((batch, self._threads.submit(self._tokenize, batch)))
            if len(pending) > 2 * len(self._workers):
                yield _result(*pending.popleft())
        while pending:
            yield _result(*pending.popleft())
        if failure is not None:
            raise failure

    def _tokenize(self, batch: RecordBatch) -> TokenizedBatch:
        worker = self._idle.get()
        try:
            return worker.tokenize(batch)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)


def _result(batch: RecordBatch, future: Future[TokenizedBatch]) -> tuple[RecordBatch, TokenizedBatch]:
    return batch, future.result()


class _Worker:
    """The parent's end of a worker process."""

    def __init__(self, tokenizer: RecordTokenizer) -> None:
        root = str(Path(__file__).parent.parent)
        path = os.pathsep.join(dict.fromkeys([root, *filter(None, sys.path)]))
        self._process = subprocess.Popen(
            [sys.executable, "-c", ENTRY_POINT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._send(tokenizer)

    def tokenize(self, batch: RecordBatch) -> TokenizedBatch:
        self._send(batch)
        assert self._process.stdout is not None
        try:
            reply = pickle.load(self._process.stdout)
        except EOFError:
            raise _exited(self._process.wait()) from None
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _send(self, value: object) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(value, self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise _exited(self._process.wait()) from None

    def kill(self) -> None:
        self._process.kill()  # it has no state to save, and its reply is no longer read
        self._process.communicate()


def _exited(code: int) -> ValueError:
    how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
    return ValueError(f"a tokenization worker {how}; a common reason is too little memory")


def worker_main() -> None:
    """Main loop of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    replies, sys.stdout = sys.stdout.buffer, sys.stderr  # so that prints do not mix with the replies
    tokenizer: RecordTokenizer = pickle.load(sys.stdin.buffer)
    while True:
        try:
            batch = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply: TokenizedBatch | Exception = tokenizer.tokenize_batch(batch)
        except Exception as error:
            reply = error
        pickle.dump(reply, replies, pickle.HIGHEST_PROTOCOL)
        replies.flush()
