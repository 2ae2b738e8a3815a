"""Limits on HTTP requests: size and arrival time of the head (uvicorn's protocol) and of the body.

uvicorn alone waits without limit for the head of a request, and accepts one of any size.
"""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.api.errors import APIError

HEAD_TIMEOUT = 15  # seconds for the head of a request (request line and headers) to arrive
MAX_HEAD_SIZE = 64 * 2**10  # bytes, not counting what arrives together with the end of the head
BODY_TIMEOUT = 60  # seconds for the body to arrive
DRAIN_FACTOR = 4  # bodies up to this many times the limit are read to the end: a client that still sends ignores responses


class BoundedHTTPProtocol(HttpToolsProtocol):
    """uvicorn's protocol; closes a connection whose request head is too slow or too large."""

    _timer: asyncio.TimerHandle | None = None  # runs while a head is awaited
    _received = 0  # bytes since the head began

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called when the connection opens."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when the connection closes."""
        self._cancel_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called with each chunk of data."""
        super().data_received(data)
        self._received += len(data)
        if self._timer is not None and self._received > MAX_HEAD_SIZE:
            self._cancel_timer()
            self.send_400_response("Request header fields too large.")

    def on_message_begin(self) -> None:
        """Called with the first byte of a request."""
        super().on_message_begin()
        self._start_timer()

    def on_headers_complete(self) -> None:
        """Called with the last byte of the head."""
        self._cancel_timer()
        super().on_headers_complete()

    def _start_timer(self) -> None:
        self._cancel_timer()
        self._received = 0
        self._timer = self.loop.call_later(HEAD_TIMEOUT, self.transport.abort)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


async def read_json_body(request: Request, max_size: int) -> bytes:
    """Read the body of a request, without parsing it.

    Args:
        request: a request whose body has not been read.
        max_size: limit in bytes.

    Raises:
        APIError: 415, not declared as uncompressed JSON; 413, too large; 408, too slow.
    """
    _require_json(request)
    too_large = APIError(413, f"The request body is larger than {max_size} bytes", code="payload_too_large")
    if int(request.headers.get("content-length", 0)) > DRAIN_FACTOR * max_size:
        raise too_large
    try:
        body = await asyncio.wait_for(_receive(request, max_size), BODY_TIMEOUT)
    except asyncio.TimeoutError:
        message = f"The request body did not arrive within {BODY_TIMEOUT} s"
        raise APIError(408, message, code="timeout", headers={"Connection": "close"}) from None
    if body is None:
        raise too_large
    return body


def _require_json(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        got = f", got {media_type}" if media_type else ""
        raise APIError(415, f"Expected Content-Type: application/json{got}", code="unsupported_media_type")
    if encoding := request.headers.get("content-encoding"):
        raise APIError(415, f"Unsupported Content-Encoding: {encoding}; send plain JSON", code="unsupported_media_type")


async def _receive(request: Request, max_size: int) -> bytes | None:
    """The body, or None if it is larger than the limit."""
    size, chunks = 0, []
    async for chunk in request.stream():
        size += len(chunk)
        if size > DRAIN_FACTOR * max_size:
            break
        if size <= max_size:
            chunks.append(chunk)
    return b"".join(chunks) if size <= max_size else None
