"""The server: LitServe's application and worker processes, with a life of our own around them.

    server = Server(options)        # whatever can be checked before a process is started
    server.run()                    # until SIGTERM or Ctrl-C

One process serves HTTP and starts a worker for each device; the model is in the workers alone. LitServe's ``run`` is not
used: it listens only when a model is loaded, at three addresses, forks the HTTP server, needs a manager process, and leaves
all of them behind when it is killed. Here:

- The port is open from the beginning: 503 until a model is loaded, /health and the chat page at once.
- SIGTERM or Ctrl-C: new requests get 503, running answers have ``drain_timeout`` seconds, and the exit code is 0.
- A worker that ends is replaced; whoever waited for it gets an error.
- A worker notices when this process ends, however it ends: no process is left behind.

It stands on inner parts of LitServe, whose version is pinned for that: tests/serve/test_litserve_contract.py lists them.
"""

from __future__ import annotations

import contextlib
import multiprocessing.resource_tracker
import signal
import threading
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from litserve import LitServer

from bumblebee.tokenizer.tokenizer import Tokenizer
from serve import errors, page
from serve.auth import Keys
from serve.connection import Connection
from serve.console import say
from serve.endpoints import Endpoints
from serve.engine_client import Hub
from serve.http import HTTP, listening
from serve.metrics import CountRequests, Metrics
from serve.serve_options import ServeOptions
from serve.supervisor import Workers
from serve.worker import Worker
from serve.worker_messages import Ready

SIGNALS = {signal.SIGINT, signal.SIGTERM}
KEEP_ALIVE = 15  # seconds that an idle connection stays open: longer than most clients keep theirs
GRACE = 5  # seconds that the last bytes of an answer have to leave


class Server(LitServer):
    """A server of one model.

    Args:
        options: what it is told.

    Raises:
        ValueError: no model folder or tokenizer there, an address that cannot be used, or one that needs a key.
    """

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        keys = Keys(options)
        tokenizer = tokenizer_of(options.model)
        self.socket = listening(options.host, options.port)
        metrics = Metrics(lambda: [(each.index, each.stats) for each in self.hub.replicas if each.stats])
        self.hub = Hub(options, metrics)
        self.endpoints = Endpoints(options, tokenizer, self.hub)
        super().__init__(
            Worker(options, keys, self.endpoints),
            accelerator="cpu",  # LitServe is to look for no devices: ours are below
            timeout=False,
            disable_openapi_url=True,
            middlewares=[(CountRequests, {"metrics": metrics})],
        )
        self.devices = options.devices
        self.workers_setup_status: dict[str, str] = {}  # LitServe's way; our workers tell the hub
        self.workers = Workers(self.hub, self.devices, self.launch, self.loaded, self.give_up)
        self.error: BaseException | None = None
        self._launching = threading.Lock()
        errors.install(self.app)
        self.app.router.routes.extend(page.routes())

    @property
    def url(self) -> str:
        """Where it is reached."""
        host, port = self.socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        """Serve until a signal ends it.

        Raises:
            ValueError: the model cannot be loaded.
            SystemExit: it cannot, and what there is to say has been said.
        """
        level = self.options.log_level
        config = uvicorn.Config(
            self.app,
            log_level=level,
            access_log=level in ("debug", "info"),
            server_header=False,
            http=Connection,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=GRACE,
        )
        say(f"loading {self.options.model} ({', '.join(self.devices)}), {self.url}")
        self.http = HTTP(config, self.hub, self.workers.kill)
        try:
            self.http.run(sockets=[self.socket])
        finally:
            self.workers.kill()
        if self.error is not None:
            raise self.error

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Around the time in which HTTP is served: the workers' life."""
        await self.workers.start()
        yield
        await self.workers.stop()

    def loaded(self, ready: Ready) -> None:
        """A worker has loaded the model."""
        self.endpoints.loaded(ready)
        say(
            f"ready: {self.url} serves {self.options.model} as {self.options.name!r} on {ready.device}: {ready.parameters:,}"
            f" parameters in {ready.dtype}, {ready.cache_tokens:,} positions of cache, {ready.context_length:,} for a request"
        )

    def give_up(self, error: BaseException) -> None:
        """End the server: there is no model to serve."""
        self.error = self.error or error
        self.http.should_exit = True

    def launch(self, index: int, pipe: Pipe) -> BaseProcess:
        """Start the worker of a device. Signals are for this process alone: a terminal sends Ctrl-C to all."""
        multiprocessing.resource_tracker.ensure_running()  # starting it later would let the signals through again
        with self._launching:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                self._transport = None  # LitServe's; the pipe goes both ways
                self.litapi_request_queues[self.endpoints.api_path] = pipe
                return self.launch_single_inference_worker(self.lit_api, index)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _register_internal_endpoints(self) -> None:
        """In the place of LitServe's own: what anybody may ask, without a key."""
        for path, endpoint in (("/health", self.endpoints.health), ("/ready", self.endpoints.ready)):
            self.app.add_api_route(path, endpoint, methods=["GET", "HEAD"])


def tokenizer_of(folder: str) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises:
        ValueError: there is no model folder, or no tokenizer in it.
    """
    if not any((Path(folder) / name).is_file() for name in ("config.json", "adapter_config.json")):
        from bumblebee.checkpoint.hf_folder import load_config  # says what is wrong; it imports torch, so only then

        load_config(folder)
    return Tokenizer.from_pretrained(folder)
