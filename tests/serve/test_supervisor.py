"""The supervisor, with fake processes and pipes."""

from __future__ import annotations

import asyncio
import os
from multiprocessing.connection import Connection
from typing import Any

import pytest

from bumblebee.inference.engine_config import EngineStats
from bumblebee.inference.sampling.sampling_params import SamplingParams
from serve.metrics import Metrics
from serve.serve_options import ServeOptions
from serve.workers.engine_client import EngineClient
from serve.workers.messages import Heartbeat, StepOutputs, WorkerFailed, WorkerReady
from serve.workers.supervisor import Supervisor

pytestmark = pytest.mark.anyio

STATS = EngineStats(0, 0, 10, 10, 0, 0, 0, 0, 0)
READY = WorkerReady("cpu", "float32", 1000, 400, 160, 160, SamplingParams(), STATS)


class Process:
    """A fake worker process that only has its end of the pipe."""

    exitcode = -9

    def __init__(self, pipe: Connection) -> None:
        # The parent closes its copy of the worker's end after the start.
        self.pipe = Connection(os.dup(pipe.fileno()))

    def join(self, timeout: float | None = None) -> None:
        """Returns at once."""

    def kill(self) -> None:
        self.pipe.close()

    def is_alive(self) -> bool:
        return False


class Fake:
    """A supervisor with fake processes, and the calls it made."""

    def __init__(self, fails: int = 0, devices: int = 1, **options: float) -> None:
        self.fails = fails  # number of starts that fail, after the first
        self.processes: list[Process] = []
        self.ready: list[WorkerReady] = []
        self.errors: list[BaseException] = []
        self.engine_client = EngineClient(ServeOptions("folder", **options), Metrics(lambda: []))
        self.workers = Supervisor(self.engine_client, ["cpu"] * devices, self.launch, self.ready.append, self.errors.append)

    def launch(self, index: int, pipe: Connection) -> Any:
        if self.processes and self.fails:
            self.fails -= 1
            raise OSError("no memory")
        self.processes.append(Process(pipe))
        return self.processes[-1]


async def wait_until(holds: Any) -> None:
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the condition did not become true")


async def test_dead_worker_is_replaced():
    fake = Fake()
    await fake.workers.start()
    assert fake.engine_client.state == "loading"
    fake.processes[0].pipe.send(READY)
    await wait_until(lambda: fake.engine_client.state == "ready")
    fake.processes[0].pipe.close()
    await wait_until(lambda: len(fake.processes) == 2)
    assert fake.engine_client.state == "restarting"
    fake.processes[1].pipe.send(READY)
    await wait_until(lambda: fake.engine_client.state == "ready")
    assert len(fake.engine_client.replicas) == 1 and not fake.errors
    await fake.workers.stop()


async def test_silent_worker_is_replaced_when_loaded(caplog: pytest.LogCaptureFixture):
    fake = Fake(heartbeat_timeout=0.25)
    await fake.workers.start()
    await asyncio.sleep(0.5)
    assert len(fake.processes) == 1, "loading may take long"
    fake.processes[0].pipe.send(READY)
    await wait_until(lambda: fake.ready)
    await wait_until(lambda: len(fake.processes) == 2)
    assert fake.engine_client.state == "restarting"
    assert "worker process on cpu has sent no heartbeat for 0.25 s; killing it" in caplog.text
    assert "worker process on cpu was killed; restarting" in caplog.text
    await fake.workers.stop()


@pytest.mark.parametrize("message", [Heartbeat(9.9), StepOutputs([], [], STATS)], ids=["heartbeat", "outputs"])
async def test_worker_that_sends_anything_is_kept(message: Any):
    fake = Fake(heartbeat_timeout=0.5, step_timeout=10)
    await fake.workers.start()
    fake.processes[0].pipe.send(READY)
    for _ in range(40):
        fake.processes[0].pipe.send(message)
        await asyncio.sleep(0.02)
    assert len(fake.processes) == 1 and fake.engine_client.state == "ready"
    await fake.workers.stop()


async def test_worker_in_an_endless_step_is_replaced(caplog: pytest.LogCaptureFixture):
    fake = Fake(step_timeout=10)
    await fake.workers.start()
    fake.processes[0].pipe.send(READY)
    fake.processes[0].pipe.send(Heartbeat(10.0))
    await wait_until(lambda: len(fake.processes) == 2)
    assert "worker process on cpu has been in one step for 10 s; killing it" in caplog.text
    await fake.workers.stop()


async def test_a_failed_start_is_retried(caplog: pytest.LogCaptureFixture):
    fake = Fake(fails=1)
    await fake.workers.start()
    fake.processes[0].pipe.send(READY)
    await wait_until(lambda: fake.ready)
    fake.processes[0].pipe.close()
    await wait_until(lambda: len(fake.processes) == 2)
    assert "cannot start a worker process: no memory" in caplog.text
    await fake.workers.stop()


@pytest.mark.parametrize(
    ("message", "error_type", "text"),
    [
        (WorkerFailed("no such folder"), ValueError, "no such folder"),
        (WorkerFailed(None), SystemExit, "1"),
        (None, SystemExit, "killed by signal 9"),
    ],
    ids=["the user's", "ours", "killed"],
)
async def test_failure_before_the_first_load_is_fatal(message: Any, error_type: type[BaseException], text: str):
    fake = Fake()
    await fake.workers.start()
    if message:
        fake.processes[0].pipe.send(message)
    fake.processes[0].pipe.close()
    await wait_until(lambda: fake.errors)
    assert isinstance(fake.errors[0], error_type) and text in str(fake.errors[0])
    assert len(fake.processes) == 1
    await fake.workers.stop()


async def test_stopped_workers_are_not_replaced():
    fake = Fake(devices=2)
    await fake.workers.start()
    for process in fake.processes:
        process.pipe.send(READY)
    await wait_until(lambda: len(fake.ready) == 2)
    await fake.workers.stop()
    for process in fake.processes:
        assert process.pipe.recv() is None
        process.pipe.close()
    await asyncio.sleep(0.1)
    assert len(fake.processes) == 2 and not fake.errors
