"""A connection of a client: uvicorn's, with bounds on what it may keep the server waiting with.

uvicorn itself waits without end for the head of a request, and takes one of any size.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIME = 15  # seconds that the head of a request (its first line and headers) has to arrive
HEAD_SIZE = 64 * 2**10  # bytes that it may have, but for what arrives together with its end


class Connection(HttpToolsProtocol):
    """A connection that ends if a request's head takes too long or is too large."""

    _timer: asyncio.TimerHandle | None = None  # while a head is awaited
    _received = 0  # bytes of it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called when it begins."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when it ends."""
        self._head_is_there()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called with each piece that arrives."""
        super().data_received(data)
        self._received += len(data)
        if self._timer is not None and self._received > HEAD_SIZE:
            self._head_is_there()
            self.send_400_response("The request's head is too large.")

    def on_message_begin(self) -> None:
        """Called with the first byte of a request."""
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        """Called with the last byte of its head."""
        self._head_is_there()
        super().on_headers_complete()

    def _await_head(self) -> None:
        self._head_is_there()
        self._received = 0
        self._timer = self.loop.call_later(HEAD_TIME, self.transport.abort)

    def _head_is_there(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
