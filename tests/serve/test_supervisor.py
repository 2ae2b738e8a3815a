"""The worker processes' life, with processes and pipes that are only played."""

from __future__ import annotations

import asyncio
import os
from multiprocessing.connection import Connection
from typing import Any

import pytest

from bumblebee.inference.engine_config import EngineStats
from bumblebee.inference.sampling_params import SamplingParams
from serve.engine_client import EngineClient
from serve.metrics import Metrics
from serve.serve_options import ServeOptions
from serve.supervisor import Supervisor
from serve.worker_messages import WorkerFailed, WorkerReady

pytestmark = pytest.mark.anyio

STATS = EngineStats(0, 0, 10, 10, 0, 0, 0, 0, 0)
READY = WorkerReady("cpu", "float32", 1000, 400, 160, 160, SamplingParams(), STATS)


class Process:
    """A worker of which only the pipe's end is there."""

    exitcode = -9

    def __init__(self, pipe: Connection) -> None:
        # The parent closes its copy of the worker's end when the process has one.
        self.pipe = Connection(os.dup(pipe.fileno()))

    def join(self, timeout: float | None = None) -> None:
        """It has ended."""

    def kill(self) -> None:
        self.pipe.close()

    def is_alive(self) -> bool:
        return False


class Played:
    """Supervisor, what they have started and what was said about them."""

    def __init__(self, fails: int = 0, devices: int = 1) -> None:
        self.fails = fails  # how many of the next starts fail, after the first
        self.processes: list[Process] = []
        self.ready: list[WorkerReady] = []
        self.errors: list[BaseException] = []
        self.engine_client = EngineClient(ServeOptions("folder"), Metrics(lambda: []))
        self.workers = Supervisor(self.engine_client, ["cpu"] * devices, self.launch, self.ready.append, self.errors.append)

    def launch(self, index: int, pipe: Connection) -> Any:
        if self.processes and self.fails:
            self.fails -= 1
            raise OSError("no memory")
        self.processes.append(Process(pipe))
        return self.processes[-1]


async def until(holds: Any) -> None:
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come")


async def test_a_worker_that_ends_is_replaced_and_the_server_is_ready_again():
    played = Played()
    await played.workers.start()
    assert played.engine_client.state == "loading"
    played.processes[0].pipe.send(READY)
    await until(lambda: played.engine_client.state == "ready")
    played.processes[0].pipe.close()
    await until(lambda: len(played.processes) == 2)
    assert played.engine_client.state == "loading"
    played.processes[1].pipe.send(READY)
    await until(lambda: played.engine_client.state == "ready")
    assert len(played.engine_client.replicas) == 1 and not played.errors
    await played.workers.stop()


async def test_a_failed_start_is_retried(caplog: pytest.LogCaptureFixture):
    played = Played(fails=1)
    await played.workers.start()
    played.processes[0].pipe.send(READY)
    await until(lambda: played.ready)
    played.processes[0].pipe.close()
    await until(lambda: len(played.processes) == 2)
    assert "cannot start a worker process: no memory" in caplog.text
    await played.workers.stop()


@pytest.mark.parametrize(
    ("message", "kind", "said"),
    [
        (WorkerFailed("no such folder"), ValueError, "no such folder"),
        (WorkerFailed(None), SystemExit, "1"),
        (None, SystemExit, "killed by signal 9"),
    ],
    ids=["the user's", "ours", "killed"],
)
async def test_what_fails_before_a_model_was_there_ends_the_server(message: Any, kind: type[BaseException], said: str):
    played = Played()
    await played.workers.start()
    if message:
        played.processes[0].pipe.send(message)
    played.processes[0].pipe.close()
    await until(lambda: played.errors)
    assert isinstance(played.errors[0], kind) and said in str(played.errors[0])
    assert len(played.processes) == 1
    await played.workers.stop()


async def test_workers_that_are_stopped_are_not_replaced():
    played = Played(devices=2)
    await played.workers.start()
    for process in played.processes:
        process.pipe.send(READY)
    await until(lambda: len(played.ready) == 2)
    await played.workers.stop()
    for process in played.processes:
        assert process.pipe.recv() is None
        process.pipe.close()
    await asyncio.sleep(0.1)
    assert len(played.processes) == 2 and not played.errors
