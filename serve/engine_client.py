"""Between HTTP requests and workers: admission, the way of each output to the request that waits for it, cancellation.

Everything here runs in the event loop of the server's process. A request's jobs go to one worker, the least busy one, so that
several answers to one prompt share its pages.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bumblebee.inference.engine_config import EngineStats
from bumblebee.inference.request import EngineRequest, RequestOutput
from serve.api_errors import Fault
from serve.metrics import Metrics
from serve.serve_options import ServeOptions
from serve.worker_messages import Cancel, Ready, Step

if TYPE_CHECKING:
    from serve.requests import Job
    from serve.worker_pipe import Channel

SOON = {"Retry-After": "1"}
NEVER = {"x-should-retry": "false"}  # OpenAI's clients ask again after every 5xx, unless told so


@dataclass(eq=False)
class Replica:
    """A copy of the model in a worker process, as the server's process sees it.

    Args:
        index: among the replicas.
        channel: to the process.
        ready: what the process has said when the model was loaded; None while it is not.
        stats: the engine's, after its last step.
        runs: what it works on, by the id of the request.
    """

    index: int
    channel: Channel
    ready: Ready | None = None
    stats: EngineStats | None = None
    runs: dict[str, Run] = field(default_factory=dict)


class Run:
    """The outputs of the jobs of one HTTP request, as they come. Close it: that cancels what has not ended.

    Iterating gives (index of the job, output) until every job has ended, and raises Fault where that is not to be: a prompt
    that can never run (400), a worker that has ended (500), a time that is over (504).

    Args:
        replica: where they run.
        jobs: at least one.
        timeout: seconds that they have. It is measured here and not in the worker: it holds also for one that hangs.
        metrics: of the server.
    """

    def __init__(self, replica: Replica, jobs: Sequence[Job], timeout: float, metrics: Metrics) -> None:
        self.replica, self._metrics = replica, metrics
        self._begun = time.monotonic()
        self.indices = {uuid.uuid4().hex: job.index for job in jobs}
        self._first: dict[str, float] = {}  # when a job's first token came
        self._new = dict.fromkeys(self.indices, 0)  # tokens of each
        self._unfinished = dict.fromkeys(self.indices)
        self._undelivered = len(jobs)
        self._arrived: asyncio.Queue[RequestOutput | Fault] = asyncio.Queue()
        late = Fault(504, f"this has taken {timeout:g} s, and may not take longer", code="timeout", headers=NEVER)
        self._timer = asyncio.get_running_loop().call_later(timeout, self.fail, late)

    def __aiter__(self) -> Run:
        return self

    async def __anext__(self) -> tuple[int, RequestOutput]:
        if not self._undelivered:
            raise StopAsyncIteration
        output = await self._arrived.get()
        if isinstance(output, Fault):
            self._undelivered = 0
            raise output
        self._undelivered -= output.finish_reason is not None
        return self.indices[output.id], output

    def deliver(self, output: RequestOutput) -> None:
        """Take what a step has brought."""
        self._measure(output)
        if output.finish_reason is not None:
            self._unfinished.pop(output.id, None)
            self.replica.runs.pop(output.id, None)
        self._arrived.put_nowait(output)

    def fail(self, fault: Fault) -> None:
        """End with an error what waits for the next output."""
        self._arrived.put_nowait(fault)

    def close(self) -> None:
        """Nobody waits any more: what has not ended is cancelled."""
        self._timer.cancel()
        for id in self._unfinished:
            if self.replica.runs.pop(id, None):  # else the worker has ended before
                self.replica.channel.send(Cancel(id))
        self._unfinished.clear()

    def _measure(self, output: RequestOutput) -> None:
        now, new = time.monotonic(), len(output.tokens)
        self._new[output.id] += new
        if new and output.id not in self._first:
            self._first[output.id] = now
            self._metrics.first_token.observe(now - self._begun)
        further = self._new[output.id] - 1
        if output.finish_reason in ("stop", "length") and further > 0:
            self._metrics.further_token.observe((now - self._first[output.id]) / further)


class Hub:
    """The replicas of the model, and who may use them.

    Args:
        options: the server's.
        metrics: the server's.
    """

    def __init__(self, options: ServeOptions, metrics: Metrics) -> None:
        self.options, self.metrics = options, metrics
        self.replicas: list[Replica] = []
        self.draining = False

    @property
    def state(self) -> str:
        """What the server is at: draining, ready, or loading."""
        if self.draining:
            return "draining"
        return "ready" if any(replica.ready for replica in self.replicas) else "loading"

    @property
    def idle(self) -> bool:
        """Whether nobody waits for anything."""
        return not any(replica.runs for replica in self.replicas)

    def run(self, jobs: Sequence[Job]) -> Run:
        """Give jobs to a worker.

        Raises:
            Fault: as ``admit``.
        """
        replica = self.admit(len(jobs))
        run = Run(replica, jobs, self.options.request_timeout, self.metrics)
        for id, job in zip(run.indices, jobs, strict=True):
            replica.runs[id] = run
            replica.channel.send(EngineRequest(id, job.prompt, job.params))
        return run

    def admit(self, jobs: int = 1) -> Replica:
        """The least busy of the workers.

        Args:
            jobs: how many there are.

        Raises:
            Fault: 503 while there is no model or the server is being stopped; 429 where too many wait already.
        """
        if self.draining:
            raise draining()
        ready = [replica for replica in self.replicas if replica.ready]
        if not ready:
            raise loading()
        room = len(ready) * self.options.max_running + self.options.max_queue - sum(len(each.runs) for each in ready)
        if jobs > room:
            raise Fault(429, "too many requests wait already: try again later", code="queue_full", headers=SOON)
        return min(ready, key=lambda replica: len(replica.runs))

    def step(self, replica: Replica, step: Step) -> None:
        """Pass on what a worker's step has brought."""
        replica.stats = step.stats
        for output in step.outputs:
            if run := replica.runs.get(output.id):  # else it was cancelled
                run.deliver(output)
        for id, why in step.refused:
            if run := replica.runs.get(id):
                run.fail(Fault(400, why, code="context_length_exceeded"))

    def lost(self, replica: Replica) -> None:
        """A worker has ended: so have its requests."""
        replica.ready = replica.stats = None
        self._end(replica, Fault(500, "the model's process has ended; it is being started again", code="worker_died"))

    def abort(self) -> None:
        """End everything that runs, with an error."""
        for replica in self.replicas:
            self._end(replica, draining())

    def _end(self, replica: Replica, fault: Fault) -> None:
        runs = set(replica.runs.values())
        replica.runs.clear()
        for run in runs:
            run.fail(fault)


def loading() -> Fault:
    """There is no model yet."""
    return Fault(503, "the model is being loaded", code="loading", headers=SOON)


def draining() -> Fault:
    """There will be none any more."""
    return Fault(503, "the server is being stopped", code="draining", headers=SOON)
