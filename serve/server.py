"""The server: LitServe's application and worker processes, with its own life cycle around them.

    server = Server(options)        # checks everything that can be checked before a process is started
    server.run()                    # until SIGTERM or Ctrl-C

One process serves HTTP and starts a worker process for each device; only the workers load the model. LitServe's ``run`` is not
used: it listens only after the model is loaded, on three addresses, forks the HTTP server, needs a manager process, and leaves
all of them running when it is killed. Here:

- The port is open from the start: 503 until a model is loaded, /health and the chat page at once.
- On SIGTERM or Ctrl-C, new requests get 503, running ones have ``drain_timeout`` seconds, and the exit code is 0.
- A worker that dies is restarted, and its requests get an error.
- A worker exits when this process ends in any way: no process is left behind.

This relies on internals of LitServe, whose version is therefore pinned: tests/serve/test_litserve_contract.py lists them.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing.resource_tracker
import signal
import threading
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from litserve import LitServer

from bumblebee.checkpoint.adapters.folder import check_generates
from bumblebee.tokenizer.tokenizer import Tokenizer
from serve import chat_page
from serve.api.errors import install_exception_handlers
from serve.auth import BearerAuth
from serve.endpoints import Endpoints
from serve.http_limits import BoundedHTTPProtocol
from serve.http_server import DrainingServer, open_listening_socket
from serve.metrics import Metrics, RequestCountMiddleware
from serve.serve_options import ServeOptions
from serve.workers.engine_client import EngineClient
from serve.workers.messages import WorkerReady
from serve.workers.supervisor import Supervisor
from serve.workers.worker import Worker

SIGNALS = {signal.SIGINT, signal.SIGTERM}
KEEP_ALIVE = 15  # seconds that an idle connection stays open: longer than most clients keep theirs
SHUTDOWN_TIMEOUT = 5  # seconds for the last bytes of a response to be sent


class Server(LitServer):
    """A server for one model.

    Args:
        options: the server's.

    Raises:
        ValueError: no model folder or tokenizer, an address that cannot be used, or one that requires an API key.
    """

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        auth = BearerAuth(options)
        tokenizer = load_tokenizer(options.model)
        self.socket = open_listening_socket(options.host, options.port)
        metrics = Metrics(lambda: [(replica.index, replica.stats) for replica in self.engine_client.replicas if replica.stats])
        self.engine_client = EngineClient(options, metrics)
        self.endpoints = Endpoints(options, tokenizer, self.engine_client)
        super().__init__(
            Worker(options, auth, self.endpoints),
            accelerator="cpu",  # keeps LitServe from looking for devices; ours are set below
            timeout=False,
            disable_openapi_url=True,
            middlewares=[(RequestCountMiddleware, {"metrics": metrics})],
        )
        self.devices = options.devices
        self.workers_setup_status: dict[str, str] = {}  # required by LitServe; our workers report to the engine client
        self.supervisor = Supervisor(self.engine_client, self.devices, self.launch, self.on_ready, self.on_fatal)
        self.error: BaseException | None = None
        self._launching = threading.Lock()
        install_exception_handlers(self.app)
        self.app.router.routes.extend(chat_page.routes())

    @property
    def url(self) -> str:
        """Base URL of the server."""
        host, port = self.socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        """Serve until a signal arrives.

        Raises:
            ValueError: the model cannot be loaded.
            SystemExit: the model cannot be loaded, and the reason has been printed.
        """
        # LitServe's call of logging.debug() gives the root logger a handler, which would print our messages a second time.
        logging.getLogger("bumblebee").propagate = False
        level = self.options.log_level
        config = uvicorn.Config(
            self.app,
            log_level=level,
            access_log=level in ("debug", "info"),
            server_header=False,
            http=BoundedHTTPProtocol,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
        )
        print_line(f"loading {self.options.model} ({', '.join(self.devices)}), {self.url}")
        self.http_server = DrainingServer(config, self.engine_client, self.supervisor.kill)
        try:
            self.http_server.run(sockets=[self.socket])
        finally:
            self.supervisor.kill()
        if self.error is not None:
            raise self.error

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run the workers while HTTP is served."""
        await self.supervisor.start()
        yield
        await self.supervisor.stop()

    def on_ready(self, ready: WorkerReady) -> None:
        """Called when a worker has loaded the model."""
        self.endpoints.on_ready(ready)
        print_line(
            f"ready: {self.url} serves {self.options.model} as {self.options.name!r} on {ready.device}:"
            f" {ready.parameters:,} parameters, {ready.dtype}, KV cache of {ready.cache_tokens:,} tokens,"
            f" context length {ready.context_length:,}"
        )

    def on_fatal(self, error: BaseException) -> None:
        """Called when the model cannot be loaded; ends the server."""
        self.error = self.error or error
        self.http_server.should_exit = True

    def launch(self, index: int, pipe: Connection) -> BaseProcess:
        """Start the worker of a device. Signals are blocked in it: a terminal sends Ctrl-C to all processes."""
        multiprocessing.resource_tracker.ensure_running()  # started later, it would unblock the signals
        with self._launching:
            previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                self._transport = None  # LitServe's; the pipe is bidirectional
                self.litapi_request_queues[self.endpoints.api_path] = pipe
                return self.launch_single_inference_worker(self.lit_api, index)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, previous)

    def _register_internal_endpoints(self) -> None:
        """Replaces LitServe's own with the endpoints that need no API key."""
        for path, endpoint in (("/health", self.endpoints.health), ("/ready", self.endpoints.ready)):
            self.app.add_api_route(path, endpoint, methods=["GET", "HEAD"])


def load_tokenizer(folder: str) -> Tokenizer:
    """Load the tokenizer of a model folder.

    Raises:
        ValueError: there is no model folder, it holds a reward model, or has no tokenizer.
    """
    if not any((Path(folder) / name).is_file() for name in ("config.json", "adapter_config.json")):
        from bumblebee.checkpoint.hf_folder import load_config  # raises the error; imports torch

        load_config(folder)
    check_generates(folder)
    return Tokenizer.from_pretrained(folder)


def print_line(text: str) -> None:
    """Print a line to stdout. A closed pipe is ignored: the server does not depend on a reader of its output."""
    with contextlib.suppress(OSError, ValueError):
        print(text, flush=True)
