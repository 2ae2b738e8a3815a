"""The server process's client of the engines: admission, routing of outputs to the requests that wait for them, cancellation.

Everything here runs in the event loop of the server process. All choices of an HTTP request go to one worker, the least busy
one, so that several answers to one prompt share its cache blocks.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from bumblebee.inference.engine_config import EngineStats
from bumblebee.inference.request import EngineRequest, RequestOutput
from serve.api.errors import APIError
from serve.api.requests import ChoiceRequest
from serve.metrics import Metrics
from serve.serve_options import ServeOptions
from serve.workers.messages import CancelRequest, StepOutputs, WorkerReady
from serve.workers.pipe import WorkerPipe

RETRY_SOON = {"Retry-After": "1"}
LATE = 3  # heartbeat intervals without a message after which other replicas are preferred
DO_NOT_RETRY = {"x-should-retry": "false"}  # OpenAI's clients retry after every 5xx unless this header is set


@dataclass(eq=False)
class Replica:
    """A worker process and its copy of the model, as seen from the server process.

    Args:
        index: position among the replicas.
        pipe: to the worker process.
        ready: the worker's message after loading the model; None before.
        stats: the engine's statistics after its last step.
        streams: the output streams by engine request id.
        silence: seconds since the last message of the loaded worker, counted by the supervisor.
    """

    index: int
    pipe: WorkerPipe
    ready: WorkerReady | None = None
    stats: EngineStats | None = None
    streams: dict[str, OutputStream] = field(default_factory=dict)
    silence: float = 0.0


class OutputStream:
    """Async iterator over the engine outputs of one HTTP request; ``close`` cancels what is unfinished.

    Yields (choice index, output) until all choices have finished. Raises APIError if that is impossible: a prompt that can
    never run (400), a worker that died or hangs (500), a timeout (504).

    Args:
        replica: the worker that runs the request.
        requests: one engine request for each choice, at least one.
        timeout: seconds for all of them. Measured here and not in the worker, so that it also holds for a worker that hangs.
        metrics: the server's.
    """

    def __init__(self, replica: Replica, requests: Sequence[ChoiceRequest], timeout: float, metrics: Metrics) -> None:
        self.replica, self._metrics = replica, metrics
        self._started = time.monotonic()
        self.choices = {uuid.uuid4().hex: request.index for request in requests}  # engine request id -> choice index
        self._first_token: dict[str, float] = {}  # id -> time of the first token
        self._new_tokens = dict.fromkeys(self.choices, 0)
        self._unfinished = set(self.choices)
        self._ended: set[str] = set()
        self._undelivered = len(requests)
        self._queue: asyncio.Queue[RequestOutput | APIError] = asyncio.Queue()
        timed_out = APIError(504, f"request timed out after {timeout:g} s", code="timeout", headers=DO_NOT_RETRY)
        self._timer = asyncio.get_running_loop().call_later(timeout, self.fail, timed_out)

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> tuple[int, RequestOutput]:
        if not self._undelivered:
            raise StopAsyncIteration
        while isinstance(output := await self._queue.get(), RequestOutput) and output.id in self._ended:
            pass  # produced before the cancellation arrived
        if isinstance(output, APIError):
            self._undelivered = 0
            raise output
        self._undelivered -= output.finish_reason is not None
        return self.choices[output.id], output

    def deliver(self, output: RequestOutput) -> None:
        """Queue the output of an engine step."""
        self._measure(output)
        if output.finish_reason is not None:
            self._unfinished.discard(output.id)
            self.replica.streams.pop(output.id, None)
        self._queue.put_nowait(output)

    def fail(self, error: APIError) -> None:
        """End the stream with an error."""
        self._queue.put_nowait(error)

    def end(self, index: int) -> None:
        """Cancel a choice whose last output has not been delivered; no more of its outputs are."""
        id = next(id for id, choice in self.choices.items() if choice == index)
        self._ended.add(id)
        self._undelivered -= 1
        self._cancel(id)

    def close(self) -> None:
        """Cancel the unfinished choices."""
        self._timer.cancel()
        for id in self.choices:
            self._cancel(id)

    def _cancel(self, id: str) -> None:
        # Otherwise it has finished, or the worker has died.
        if id in self._unfinished and self.replica.streams.pop(id, None) is not None:
            self.replica.pipe.send(CancelRequest(id))
        self._unfinished.discard(id)

    def _measure(self, output: RequestOutput) -> None:
        now, new_tokens = time.monotonic(), len(output.tokens)
        self._new_tokens[output.id] += new_tokens
        if new_tokens and output.id not in self._first_token:
            self._first_token[output.id] = now
            self._metrics.time_to_first_token.observe(now - self._started)
        further = self._new_tokens[output.id] - 1
        if output.finish_reason in ("stop", "length") and further > 0:
            self._metrics.time_per_further_token.observe((now - self._first_token[output.id]) / further)


class EngineClient:
    """Admits requests and sends them to the replicas.

    Args:
        options: the server's.
        metrics: the server's.
    """

    def __init__(self, options: ServeOptions, metrics: Metrics) -> None:
        self.options, self.metrics = options, metrics
        self.replicas: list[Replica] = []
        self.draining = self.was_ready = False

    @property
    def state(self) -> str:
        """Readiness: "draining", "ready", "loading" at first, or "restarting" when all workers were lost."""
        if self.draining:
            return "draining"
        if any(replica.ready for replica in self.replicas):
            return "ready"
        return "restarting" if self.was_ready else "loading"

    @property
    def idle(self) -> bool:
        """Whether no request is running or queued."""
        return not any(replica.streams for replica in self.replicas)

    def generate(self, requests: Sequence[ChoiceRequest]) -> OutputStream:
        """Send the choices of an HTTP request to a worker.

        Raises:
            APIError: as ``admit``.
        """
        replica = self.admit(len(requests))
        stream = OutputStream(replica, requests, self.options.request_timeout, self.metrics)
        for id, request in zip(stream.choices, requests, strict=True):
            replica.streams[id] = stream
            scored, only = request.prompt_logprobs, request.prompt_only
            replica.pipe.send(EngineRequest(id, request.prompt, request.params, prompt_logprobs=scored, prompt_only=only))
        return stream

    def admit(self, count: int = 1) -> Replica:
        """Check that requests can be accepted, and return the least busy replica. Those that may hang come last.

        Args:
            count: number of engine requests.

        Raises:
            APIError: 503 while the model is loading or the server is shutting down; 429 if the queue is full.
        """
        if self.draining:
            raise shutting_down()
        ready = [replica for replica in self.replicas if replica.ready]
        if not ready:
            raise worker_restarting() if self.was_ready else model_loading()
        capacity = len(ready) * self.options.max_running + self.options.max_queue
        if count > capacity - sum(len(replica.streams) for replica in ready):
            raise APIError(429, "The request queue is full; try again later", code="queue_full", headers=RETRY_SOON)
        late = LATE * self.options.heartbeat_interval
        return min(ready, key=lambda replica: (replica.silence > late, len(replica.streams)))

    def worker_ready(self, replica: Replica, message: WorkerReady) -> None:
        """Send requests to a worker that has loaded the model."""
        replica.ready, replica.stats, self.was_ready = message, message.stats, True

    def deliver(self, replica: Replica, step: StepOutputs) -> None:
        """Pass the outputs of a worker's step on to their streams."""
        replica.stats = step.stats
        for output in step.outputs:
            if stream := replica.streams.get(output.id):  # otherwise it was cancelled
                stream.deliver(output)
        for id, reason in step.rejected:
            if stream := replica.streams.get(id):
                stream.fail(APIError(400, reason, code="context_length_exceeded"))

    def worker_died(self, replica: Replica) -> None:
        """Fail the requests of a worker process that ended."""
        self._lose(replica, APIError(500, "The worker process died and is being restarted", code="worker_died"))

    def worker_hangs(self, replica: Replica) -> None:
        """Fail the requests of a worker process that no longer responds."""
        message = "The worker process does not respond and is being restarted"
        self._lose(replica, APIError(500, message, code="worker_unresponsive"))

    def abort_all(self) -> None:
        """Fail all running and queued requests."""
        for replica in self.replicas:
            self._fail_all(replica, shutting_down())

    def _lose(self, replica: Replica, error: APIError) -> None:
        replica.ready = replica.stats = None
        self._fail_all(replica, error)

    def _fail_all(self, replica: Replica, error: APIError) -> None:
        streams = set(replica.streams.values())
        replica.streams.clear()
        for stream in streams:
            stream.fail(error)


def model_loading() -> APIError:
    """The error while no worker has loaded the model."""
    return APIError(503, "The model is loading", code="loading", headers=RETRY_SOON)


def worker_restarting() -> APIError:
    """The error while no worker is left and a new one loads the model."""
    return APIError(503, "The worker process is being restarted", code="restarting", headers=RETRY_SOON)


def shutting_down() -> APIError:
    """The error while the server drains."""
    return APIError(503, "The server is shutting down", code="draining", headers=RETRY_SOON)
