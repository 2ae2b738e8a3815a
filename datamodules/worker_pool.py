"""Workers: processes that encode batches of records, in the order of the records.

A worker is a fresh interpreter (a fork would copy a parent that may have torch's threads) which does not run the user's script
again. It reads pickles from its standard input, answers on its standard output, and ends when its input does: even when the
parent was killed none is left behind. A thread of the parent talks to each.
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
from typing import Any

from datamodules.record_files import Record, RecordError
from datamodules.tokenize import Block, Encoder

Items = list[Record | RecordError]

MOST = 16  # beyond, the parent that reads the files is what one waits for
ENOUGH = 2_000_000  # bytes to encode, from which on workers earn their start
# Our package first: in a worker, too, the user may have a ``datamodules`` folder earlier on the path.
ENTRY = "from bumblebee.shared_packages import prefer_ours; prefer_ours(); from datamodules.worker_pool import serve; serve()"


def encoded(encoder: Encoder, batches: Iterable[Items], processes: int) -> Iterator[tuple[Items, Block]]:
    """Each batch with what it became, in order.

    An error of the batches' source comes after all that was read before it.

    Args:
        encoder: does the work.
        batches: read a few ahead.
        processes: workers; with 1 the work is done here.

    Raises:
        ValueError: a worker was killed.
    """
    if processes == 1:
        yield from ((batch, encoder.encode(batch)) for batch in batches)
        return
    pool = _Pool(encoder, processes)
    try:
        yield from pool.run(iter(batches))
    finally:
        pool.close()


def how_many(encoder: Encoder, size: int) -> int:
    """Processes for so many bytes of records: as many as cores, or 1 where they would not earn their start.

    A class of the user's script cannot be found from another process.
    """
    if encoder.threaded or size < ENOUGH or type(encoder).__module__ == "__main__":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST, cores)


class _Pool:
    def __init__(self, encoder: Encoder, processes: int) -> None:
        self.workers = [_Worker(encoder) for _ in range(processes)]
        self.free: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self.workers:
            self.free.put(worker)
        self.threads = ThreadPoolExecutor(processes)

    def run(self, batches: Iterator[Items]) -> Iterator[tuple[Items, Block]]:
        waiting: deque[tuple[Items, Future[Block]]] = deque()
        failure: Exception | None = None
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:
                failure = error
                break
            if batch is None:
                break
            waiting.append((batch, self.threads.submit(self._encode, batch)))
            if len(waiting) > 2 * len(self.workers):
                yield _done(*waiting.popleft())
        while waiting:
            yield _done(*waiting.popleft())
        if failure is not None:
            raise failure

    def _encode(self, batch: Items) -> Block:
        worker = self.free.get()
        try:
            return worker.encode(batch)
        finally:
            self.free.put(worker)

    def close(self) -> None:
        for worker in self.workers:
            worker.end()
        self.threads.shutdown(cancel_futures=True)


def _done(batch: Items, result: Future[Block]) -> tuple[Items, Block]:
    return batch, result.result()


class _Worker:
    def __init__(self, encoder: Encoder) -> None:
        here = str(Path(__file__).parent.parent)
        path = os.pathsep.join(dict.fromkeys([here, *filter(None, sys.path)]))
        self.process = subprocess.Popen(
            [sys.executable, "-c", ENTRY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
        )
        self._send(encoder)

    def encode(self, batch: Items) -> Block:
        self._send(batch)
        assert self.process.stdout is not None
        try:
            answer = pickle.load(self.process.stdout)
        except EOFError:
            raise _killed(self.process.wait()) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _send(self, value: Any) -> None:
        assert self.process.stdin is not None
        try:
            pickle.dump(value, self.process.stdin, pickle.HIGHEST_PROTOCOL)
            self.process.stdin.flush()
        except BrokenPipeError:
            raise _killed(self.process.wait()) from None

    def end(self) -> None:
        self.process.kill()  # nothing of its own to finish; what it writes, the parent no longer reads
        self.process.communicate()


def _killed(code: int) -> ValueError:
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    return ValueError(f"a process that tokenises ended {how}; where memory is short, that is often the reason")


def serve() -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    channel, sys.stdout = sys.stdout.buffer, sys.stderr  # whoever prints does not disturb the answers
    encoder: Encoder = pickle.load(sys.stdin.buffer)
    while True:
        try:
            batch = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Block | Exception = encoder.encode(batch)
        except Exception as error:
            answer = error
        pickle.dump(answer, channel, pickle.HIGHEST_PROTOCOL)
        channel.flush()
