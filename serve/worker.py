"""The worker process: a model, its engine, and a LitServe loop that turns messages into steps.

LitServe starts the process, calls ``Worker.setup`` and then ``Loop.run``. Its own continuous-batching loop polls while nothing
is to do, and cannot cancel; this one waits for the pipe, reads what has arrived before each step, and sends all outputs of a
step in one message. So a cancelled request is gone before the next step, and an idle worker uses no processor time.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import litserve
from litserve.loops.base import LitLoop
from starlette.requests import Request

from bumblebee.inference.request import EngineRequest
from serve.auth import Keys
from serve.serve_options import ServeOptions
from serve.worker_messages import Cancel, Failed, Ready, Step

if TYPE_CHECKING:
    from bumblebee.inference.engine import GenerationEngine


# On a CPU, torch and oneDNN keep a program for each number of rows that they have multiplied, 1024 of them unless told
# otherwise: some hundred MB, which grow for thousands of requests. To make one again takes less than a millisecond.
PROGRAMS_KEPT = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}


class Worker(litserve.LitAPI):
    """What LitServe starts in a process of its own.

    Args:
        options: the server's.
        keys: who may ask; looked at in the server's process.
        spec: the routes; they stay in the server's process.
    """

    def __init__(self, options: ServeOptions, keys: Keys, spec: Any) -> None:
        super().__init__(loop=Loop(), spec=spec)
        self.options, self.keys = options, keys

    def authorize(self, request: Request) -> None:
        """LitServe asks this before each of the spec's routes."""
        self.keys.check_host(request.headers.get("host"))
        self.keys.check(request.headers.get("authorization"))

    def setup(self, device: str) -> None:
        """Load the model. What goes wrong is told by the loop: LitServe would only log it."""
        end_with_parent()
        os.environ.update(PROGRAMS_KEPT | os.environ)  # read when torch is imported
        self.engine: GenerationEngine | None = None
        self.greeting: Ready | Failed
        try:
            self.engine, self.greeting = self.load(device)
        except (ValueError, OSError) as error:
            self.greeting = Failed(str(error))
        except Exception:
            traceback.print_exc()
            self.greeting = Failed(None)

    def load(self, device: str) -> tuple[GenerationEngine, Ready]:
        """The engine, and what the server's process has to know about it.

        Raises:
            ValueError: the folder, the device or the dtype cannot be used.
        """
        from bumblebee.inference.generator import Generator  # torch, in this process alone

        options = self.options
        generator = Generator.from_pretrained(
            options.model, device, options.dtype, options.device_map, options.trust_remote_code
        )
        engine = generator.engine(options.limits)
        cache_tokens = engine.cache_tokens
        return engine, Ready(
            device=", ".join(dict.fromkeys(str(weight.device) for weight in generator.model.parameters())),
            dtype=str(generator.dtype).removeprefix("torch."),
            parameters=generator.model.num_parameters(),
            vocab_size=generator.model.config.vocab_size,
            cache_tokens=cache_tokens,
            context_length=min(generator.model.config.max_position_embeddings, cache_tokens),
            defaults=generator.defaults,
            stats=engine.stats(),
        )


class Loop(LitLoop):
    """Messages in, steps out, until the server's process says that it is over."""

    def run(self, lit_api: Worker, device: str, worker_id: int, request_queue: Connection, *rest: Any) -> None:
        """Called by LitServe when the model is loaded. ``request_queue`` is our pipe to the server's process."""
        request_queue.send(lit_api.greeting)
        if lit_api.engine is not None:
            with suppress(ConnectionError):  # the server has gone
                work(lit_api.engine, request_queue)
        sys.stdout.flush()
        os._exit(0)  # at once: tidying up an interpreter with torch takes a second, and LitServe would call this again


def work(engine: GenerationEngine, pipe: Connection) -> None:
    """Compute what comes through a pipe until it closes."""
    while (messages := arrived(pipe, engine.busy)) is not None:
        refused = [refusal for message in messages if (refusal := take(engine, message))]
        outputs = engine.step()
        if outputs or refused:
            pipe.send(Step(outputs, refused, engine.stats()))


def arrived(pipe: Connection, busy: bool) -> list[EngineRequest | Cancel] | None:
    """The messages that are there; where nothing else is to do, wait for one. None when there will be no more."""
    messages: list[EngineRequest | Cancel] = []
    try:
        while pipe.poll(0 if busy or messages else None):
            message = pipe.recv()
            if message is None:
                return None
            messages.append(message)
    except EOFError:
        return None
    return messages


def take(engine: GenerationEngine, message: EngineRequest | Cancel) -> tuple[str, str] | None:
    """Tell the engine; (id, why) of a request that it refuses."""
    if isinstance(message, Cancel):
        engine.cancel(message.id)
        return None
    try:
        engine.submit(message)
    except ValueError as error:
        return message.id, str(error)
    return None


def end_with_parent() -> None:
    """End this process when the server's ends in any way, killed ones included: no worker is left behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
