"""The HTTP side of a server's life: a socket that is ours before anything else begins, and an end that lets answers finish."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from serve.console import say
from serve.engine_client import Hub

STUCK = 120  # seconds after which a connection ends that takes no bytes of its answer
BACKLOG = 2048  # connections that wait to be taken, as uvicorn's own default


class HTTP(uvicorn.Server):
    """uvicorn that drains.

    The first SIGTERM or Ctrl-C refuses new requests (503) and waits for the running ones, ``drain_timeout`` seconds at most. A
    second one of the same kind stops at once.

    Args:
        config: uvicorn's.
        hub: knows what runs.
        kill: ends the workers at once.
    """

    def __init__(self, config: uvicorn.Config, hub: Hub, kill: Callable[[], None]) -> None:
        super().__init__(config)
        self._hub, self._kill = hub, kill
        self._seen: set[int] = set()
        self._until = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called with each signal."""
        if sig in self._seen:  # another number is a launcher that passes Ctrl-C on as SIGTERM
            self._kill()
            os._exit(128 + sig)
        if not self._seen:
            seconds = self._hub.options.drain_timeout
            self._hub.draining, self._until = True, time.monotonic() + seconds
            if not self._hub.idle:
                say(f"stopping: running answers have {seconds:g} s; once more stops at once", sys.stderr)
        self._seen.add(sig)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; true ends the server."""
        if self._seen:
            if time.monotonic() > self._until:
                self._hub.abort()
            self.should_exit = self.should_exit or self._hub.idle
        return await super().on_tick(counter)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens at an address: connections wait until the server takes them.

    It listens at once. Two sockets that are only bound can have the same address, and two servers would begin to load.

    Raises:
        ValueError: the port is in use, or there is no such address on this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ValueError(f"host {host!r} is no address of this machine: {error.strerror}") from None
    family, kind, protocol, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)  # localhost: 127.0.0.1
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # A client that has gone without a word, or reads nothing, is not kept for ever. Connections inherit these options.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STUCK * 1000)
    try:
        bound.bind(address)
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise ValueError(_why(error, host, port)) from None
    return bound


def _why(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use on {host}: stop what listens there, or take another, --port {port + 1}"
    if error.errno == errno.EACCES:
        return f"port {port} may not be used: ports below 1024 are the system's, take another, --port 8000"
    return f"host {host!r} is no address of this machine: {error.strerror}"
