"""The worker process: a model, its engine, and a LitServe loop that serves the pipe.

LitServe starts the process, calls ``Worker.setup`` and then ``WorkerLoop.run``. LitServe's own continuous-batching loop polls
when idle and cannot cancel. This loop waits on the pipe, reads all pending messages before each step, and sends all outputs of
a step in one message: a cancelled request is gone before the next step, and an idle worker only sends heartbeats.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

import litserve
from litserve.loops.base import LitLoop
from litserve.specs.base import LitSpec
from starlette.requests import Request

from bumblebee.inference.request import EngineRequest
from serve.auth import BearerAuth
from serve.serve_options import ServeOptions
from serve.workers.heartbeat import Heartbeats
from serve.workers.messages import CancelRequest, StepOutputs, WorkerFailed, WorkerReady

if TYPE_CHECKING:
    from bumblebee.inference.engine import GenerationEngine


# On a CPU, torch and oneDNN cache a compiled primitive for each number of rows they have multiplied, 1024 by default: some
# hundred MB, growing over thousands of requests. Compiling one again takes less than a millisecond.
PRIMITIVE_CACHE_LIMITS = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}


class Worker(litserve.LitAPI):
    """The LitAPI that LitServe runs in each worker process.

    Args:
        options: the server's.
        auth: used in the server process only.
        spec: the routes; used in the server process only.
    """

    def __init__(self, options: ServeOptions, auth: BearerAuth, spec: LitSpec) -> None:
        super().__init__(loop=WorkerLoop(), spec=spec)
        self.options, self.auth = options, auth

    def authorize(self, request: Request) -> None:
        """Called by LitServe before each route of the spec, in the server process."""
        self.auth.check_host(request.headers.get("host"))
        self.auth.check_key(request.headers.get("authorization"))

    def setup(self, device: str) -> None:
        """Load the model. Errors are sent to the server process by the loop; LitServe would only log them."""
        exit_with_parent()
        os.environ.update(PRIMITIVE_CACHE_LIMITS | os.environ)  # read when torch is imported
        self.engine: GenerationEngine | None = None
        self.result: WorkerReady | WorkerFailed
        try:
            self.engine, self.result = self.load(device)
        except (ValueError, OSError) as error:
            self.result = WorkerFailed(str(error))
        except Exception:
            traceback.print_exc()
            self.result = WorkerFailed(None)

    def load(self, device: str) -> tuple[GenerationEngine, WorkerReady]:
        """Load the model folder into an engine.

        Raises:
            ValueError: the folder, the device or the dtype cannot be used.
        """
        from bumblebee.inference.generator import Generator  # imports torch, which the server process must not

        options = self.options
        generator = Generator.from_pretrained(
            options.model, device, options.dtype, options.device_map, options.trust_remote_code, options.quantize
        )
        engine = generator.engine(options.engine_config)
        cache_tokens = engine.cache_tokens
        return engine, WorkerReady(
            device=", ".join(dict.fromkeys(str(weight.device) for weight in generator.model.parameters())),
            dtype=generator.precision,
            parameters=generator.model.num_parameters(),
            vocab_size=generator.model.config.vocab_size,
            cache_tokens=cache_tokens,
            context_length=min(generator.model.config.max_position_embeddings, cache_tokens),
            defaults=generator.defaults,
            stats=engine.stats(),
        )


class WorkerLoop(LitLoop):
    """Runs the engine until the server process closes the pipe."""

    def run(self, lit_api: Worker, device: str, worker_id: int, request_queue: Connection, *rest: object) -> None:
        """Called by LitServe after ``setup``. ``request_queue`` is the pipe to the server process."""
        request_queue.send(lit_api.result)
        if lit_api.engine is not None:
            with suppress(ConnectionError):  # the server process has ended
                run_engine(lit_api.engine, request_queue, lit_api.options.heartbeat_interval)
        sys.stdout.flush()
        os._exit(0)  # finalizing an interpreter with torch takes a second, and LitServe would call this method again


def run_engine(engine: GenerationEngine, pipe: Connection, heartbeat_interval: float = 1.0) -> None:
    """Step the engine and send its outputs, until the pipe is closed."""
    with Heartbeats(pipe, heartbeat_interval) as heartbeats:
        while (messages := receive_messages(pipe, engine.busy)) is not None:
            with heartbeats.step():
                rejected = [rejection for message in messages if (rejection := handle_message(engine, message))]
                outputs = engine.step()
            if outputs or rejected:
                heartbeats.send(StepOutputs(outputs, rejected, engine.stats()))


def receive_messages(pipe: Connection, busy: bool) -> list[EngineRequest | CancelRequest] | None:
    """All pending messages; blocks for the first one if the engine is idle. None if the pipe is closed."""
    messages: list[EngineRequest | CancelRequest] = []
    try:
        while pipe.poll(0 if busy or messages else None):
            message = pipe.recv()
            if message is None:
                return None
            messages.append(message)
    except EOFError:
        return None
    return messages


def handle_message(engine: GenerationEngine, message: EngineRequest | CancelRequest) -> tuple[str, str] | None:
    """Submit or cancel a request. Returns (id, reason) if the engine rejects it."""
    if isinstance(message, CancelRequest):
        engine.cancel(message.id)
        return None
    try:
        engine.submit(message)
    except ValueError as error:
        return message.id, str(error)
    return None


def exit_with_parent() -> None:
    """Exit as soon as the server process ends in any way, so that no worker outlives a killed server."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="exit-with-parent", daemon=True).start()
