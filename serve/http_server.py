"""The HTTP server: uvicorn with graceful shutdown, on a listening socket that is opened before the model is loaded."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from serve.workers.engine_client import EngineClient

logger = logging.getLogger(f"bumblebee.{__name__}")

TCP_USER_TIMEOUT = 120  # seconds after which a connection is closed whose client acknowledges no data
BACKLOG = 2048  # pending connections, uvicorn's default


class DrainingServer(uvicorn.Server):
    """uvicorn that drains on shutdown.

    The first SIGTERM or Ctrl-C rejects new requests (503) and waits up to ``drain_timeout`` seconds for the running ones. A
    second signal of the same kind stops immediately.

    Args:
        config: uvicorn's configuration.
        engine_client: knows which requests are running.
        kill_workers: ends the worker processes immediately.
    """

    def __init__(self, config: uvicorn.Config, engine_client: EngineClient, kill_workers: Callable[[], None]) -> None:
        super().__init__(config)
        self._engine_client, self._kill_workers = engine_client, kill_workers
        self._signals: set[int] = set()
        self._deadline = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called with each signal."""
        if sig in self._signals:  # a launcher may pass Ctrl-C on as SIGTERM, hence only the same signal counts
            self._kill_workers()
            os._exit(128 + sig)
        if not self._signals:
            timeout = self._engine_client.options.drain_timeout
            self._engine_client.draining, self._deadline = True, time.monotonic() + timeout
            if not self._engine_client.idle:
                logger.info("shutting down: waiting up to %g s for running requests (repeat to stop immediately)", timeout)
        self._signals.add(sig)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        if self._signals:
            if time.monotonic() > self._deadline:
                self._engine_client.abort_all()
            self.should_exit = self.should_exit or self._engine_client.idle
        return await super().on_tick(counter)


def open_listening_socket(host: str, port: int) -> socket.socket:
    """Open a socket that queues connections until the server accepts them.

    It listens at once: two sockets that are only bound can share an address, and two servers would start to load a model.

    Raises:
        ValueError: the port is in use, or the address does not belong to this machine.
    """
    try:
        candidates = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ValueError(f"host {host!r} is not an address of this machine: {error.strerror}") from None
    # Prefer IPv4: localhost is 127.0.0.1.
    family, kind, protocol, _, address = min(candidates, key=lambda candidate: candidate[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Close connections of clients that vanished or do not read. Accepted connections inherit these options.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT * 1000)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ValueError(_bind_error(error, host, port)) from None
    return listener


def _bind_error(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use on {host}: stop the other process, or use another port, --port {port + 1}"
    if error.errno == errno.EACCES:
        return f"port {port} requires privileges, like all ports below 1024: use another port, --port 8000"
    return f"host {host!r} is not an address of this machine: {error.strerror}"
