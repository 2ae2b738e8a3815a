"""Starts, watches, restarts and stops the worker processes.

If a worker fails before any worker has loaded the model, the server exits: the user has to change something. Later failures
are restarted, with exponential backoff.

A worker hangs if it sends nothing for ``heartbeat_timeout`` seconds, or if one of its steps takes ``step_timeout``. It is
killed and replaced. A worker that loads the model is not watched: nothing waits for it, and loading may block the process for
long.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import signal
from collections.abc import Callable, Coroutine, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from serve.workers.engine_client import EngineClient, Replica
from serve.workers.messages import FromWorker, Heartbeat, StepOutputs, WorkerReady
from serve.workers.pipe import WorkerPipe

logger = logging.getLogger(f"bumblebee.{__name__}")

STOP_TIMEOUT = 5  # seconds for a worker to exit before it is killed
MAX_BACKOFF = 60  # seconds between two restarts


class Supervisor:
    """Runs one worker process for each device.

    Args:
        engine_client: uses the workers.
        devices: one device name for each worker.
        launch: starts the process of the device with this index, with the worker's end of a pipe.
        on_ready: called with a worker's message after it has loaded the model.
        on_fatal: called with the exception that ends the program if the model cannot be loaded.
    """

    def __init__(
        self,
        engine_client: EngineClient,
        devices: Sequence[str],
        launch: Callable[[int, Connection], BaseProcess],
        on_ready: Callable[[WorkerReady], None],
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self.engine_client, self.devices = engine_client, devices
        self._launch, self._on_ready, self._on_fatal = launch, on_ready, on_fatal
        self._processes: dict[int, BaseProcess] = {}
        self._failures = [0] * len(devices)  # consecutive failures of each worker
        self._hanging: set[int] = set()  # workers that are being killed
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio keeps weak references only

    async def start(self) -> None:
        """Start all workers; they load the model in parallel."""
        for index in range(len(self.devices)):
            await self._start(index)
        self._create_task(self._watch())

    async def stop(self) -> None:
        """Stop all workers; those that do not exit within ``STOP_TIMEOUT`` are killed."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(asyncio.to_thread(self._stop, replica) for replica in self.engine_client.replicas))

    def kill(self) -> None:
        """Kill all workers, including one that is being started."""
        for process in multiprocessing.active_children():
            process.kill()

    async def _start(self, index: int) -> None:
        pipe = WorkerPipe(lambda message: self._receive(replica, message), lambda: self._handle_exit(replica))
        replica = Replica(index, pipe)
        remaining = (replica for replica in self.engine_client.replicas if replica.index != index)
        self.engine_client.replicas = [*remaining, replica]
        self._processes[index] = await asyncio.to_thread(self._launch, index, pipe.worker_end)
        pipe.open(asyncio.get_running_loop())

    def _receive(self, replica: Replica, message: FromWorker) -> None:
        replica.silence = 0.0
        if isinstance(message, StepOutputs):
            self.engine_client.deliver(replica, message)
        elif isinstance(message, Heartbeat):
            self._check_step(replica, message.step_seconds)
        elif isinstance(message, WorkerReady):
            self.engine_client.worker_ready(replica, message)
            self._failures[replica.index] = 0
            self._on_ready(message)
        elif not self.engine_client.was_ready:
            self._on_fatal(ValueError(message.message) if message.message else SystemExit(1))
        elif message.message:
            logger.warning("%s", message.message)

    async def _watch(self) -> None:
        """Count the silence of each worker: in intervals, so that no worker is blamed if the server itself was suspended."""
        options = self.engine_client.options
        while True:
            await asyncio.sleep(options.heartbeat_interval)
            for replica in self.engine_client.replicas:
                replica.silence += options.heartbeat_interval
                if replica.ready and replica.silence >= options.heartbeat_timeout:
                    self._kill_hanging(replica, f"has sent no heartbeat for {options.heartbeat_timeout:g} s")

    def _check_step(self, replica: Replica, seconds: float) -> None:
        if replica.ready and seconds >= (timeout := self.engine_client.options.step_timeout):
            self._kill_hanging(replica, f"has been in one step for {timeout:g} s")

    def _kill_hanging(self, replica: Replica, reason: str) -> None:
        """Fail the requests of a worker and kill it, which also ends a stopped process; its exit starts a new one."""
        logger.warning("worker process on %s %s; killing it", self.devices[replica.index], reason)
        self._hanging.add(replica.index)
        self.engine_client.worker_hangs(replica)
        self._processes[replica.index].kill()

    def _handle_exit(self, replica: Replica) -> None:
        self.engine_client.worker_died(replica)
        if not self._stopping:
            self._create_task(self._replace(replica))

    def _create_task(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _replace(self, replica: Replica) -> None:
        index = replica.index
        process = self._processes[index]
        await asyncio.to_thread(process.join)
        ending = "was killed" if index in self._hanging else f"ended, {_describe_exit(process.exitcode)}"
        self._hanging.discard(index)
        reason = f"worker process on {self.devices[index]} {ending}"
        if not self.engine_client.was_ready:
            self._on_fatal(SystemExit(f"bumblebee: {reason}, while loading the model"))
            return
        while not await self._restart(index, reason):
            reason = "no worker process"

    async def _restart(self, index: int, reason: str) -> bool:
        """Start a new worker after a backoff that grows with each failure. Returns whether it could be started."""
        backoff = min(2 ** self._failures[index] - 1, MAX_BACKOFF)
        self._failures[index] += 1
        logger.warning("%s; restarting%s", reason, f" in {backoff} s" if backoff else "")
        await asyncio.sleep(backoff)
        try:
            await self._start(index)
        except OSError as error:  # out of memory or processes
            logger.warning("cannot start a worker process: %s", error)
            return False
        return True

    def _stop(self, replica: Replica) -> None:
        process = self._processes[replica.index]
        if replica.ready:
            replica.pipe.close()
        else:  # while loading, it does not read the pipe
            process.kill()
        process.join(STOP_TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()


def _describe_exit(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        hint = ", possibly out of memory" if exitcode == -signal.SIGKILL else ""
        return f"killed by signal {-exitcode}{hint}"
    return f"exit code {exitcode}"
