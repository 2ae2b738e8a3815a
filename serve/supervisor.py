"""The worker processes: started, replaced when they end, stopped.

Before a model has first been loaded, a worker that fails ends the server: the user has to change something. Later it is
replaced, with growing pauses while that does not help.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from serve.console import say
from serve.engine_client import Hub, Replica
from serve.worker_messages import Failed, Ready, Step
from serve.worker_pipe import Channel

GRACE = 5  # seconds that a worker has to end
LONGEST_PAUSE = 60  # seconds between attempts


class Workers:
    """A process for each device.

    Args:
        hub: which uses them.
        devices: the name of each device.
        launch: starts the process of the device with this index, which gets this end of a pipe.
        ready: called with what a worker says when it has loaded the model.
        give_up: called when there is no model to serve, with what ends the program.
    """

    def __init__(
        self,
        hub: Hub,
        devices: Sequence[str],
        launch: Callable[[int, Connection], BaseProcess],
        ready: Callable[[Ready], None],
        give_up: Callable[[BaseException], None],
    ) -> None:
        self.hub, self.devices = hub, devices
        self._launch, self._ready, self._give_up = launch, ready, give_up
        self._processes: dict[int, BaseProcess] = {}
        self._failures = [0] * len(devices)  # since a worker has last been ready
        self._was_ready = self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio itself would forget them

    async def start(self) -> None:
        """Start all of them; they load side by side."""
        for index in range(len(self.devices)):
            await self._start(index)

    async def stop(self) -> None:
        """Let them end; at the latest after GRACE seconds they have."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(asyncio.to_thread(self._stop, replica) for replica in self.hub.replicas))

    def kill(self) -> None:
        """End them at once, also one that is being started."""
        for process in multiprocessing.active_children():
            process.kill()

    async def _start(self, index: int) -> None:
        channel = Channel(lambda message: self._receive(replica, message), lambda: self._lost(replica))
        replica = Replica(index, channel)
        self.hub.replicas = [*(each for each in self.hub.replicas if each.index != index), replica]
        self._processes[index] = await asyncio.to_thread(self._launch, index, channel.workers_end)
        channel.open(asyncio.get_running_loop())

    def _receive(self, replica: Replica, message: Ready | Failed | Step) -> None:
        if isinstance(message, Step):
            self.hub.step(replica, message)
        elif isinstance(message, Ready):
            replica.ready, replica.stats = message, message.stats
            self._failures[replica.index], self._was_ready = 0, True
            self._ready(message)
        elif not self._was_ready:
            self._give_up(ValueError(message.message) if message.message else SystemExit(1))
        elif message.message:
            _say(message.message)

    def _lost(self, replica: Replica) -> None:
        self.hub.lost(replica)
        if not self._stopping:
            task = asyncio.get_running_loop().create_task(self._replace(replica))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _replace(self, replica: Replica) -> None:
        index = replica.index
        process = self._processes[index]
        await asyncio.to_thread(process.join)
        how = f"the model's process on {self.devices[index]} has ended, {_cause(process.exitcode)}"
        if not self._was_ready:
            self._give_up(SystemExit(f"bumblebee: {how}, while it loaded the model"))
            return
        while not await self._started_again(index, how):
            how = "no process could be started"

    async def _started_again(self, index: int, how: str) -> bool:
        """Start another one after a pause that grows with each failure. ``how``: what has happened."""
        pause = min(2 ** self._failures[index] - 1, LONGEST_PAUSE)
        self._failures[index] += 1
        _say(f"{how}: another one is started" + (f" in {pause} s" if pause else ""))
        await asyncio.sleep(pause)
        try:
            await self._start(index)
        except OSError as error:  # no memory, no process to be had
            _say(f"no process could be started: {error}")
            return False
        return True

    def _stop(self, replica: Replica) -> None:
        process = self._processes[replica.index]
        if replica.ready:
            replica.channel.close()
        else:  # it is loading, and does not listen
            process.kill()
        process.join(GRACE)
        if process.is_alive():
            process.kill()
            process.join()


def _cause(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        killed = ", which the system sends when memory runs out" if exitcode == -signal.SIGKILL else ""
        return f"killed by signal {-exitcode}{killed}"
    return f"exit code {exitcode}"


def _say(message: str) -> None:
    say(f"bumblebee: {message}", sys.stderr)
