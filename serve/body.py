"""The bytes of a request's body: JSON, and no more than a bound."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from serve.api_errors import Fault

PATIENCE = 4  # bodies up to so many bounds are read to their end: a client that still sends would not see the answer
TIME = 60  # seconds that a body has to arrive


async def read(request: Request, bound: int) -> bytes:
    """The body of a request.

    Args:
        request: whose body has not been read.
        bound: bytes that it may have.

    Raises:
        Fault: 415, it does not say that it is plain JSON; 413, it is too large; 408, it does not arrive.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        said = f", not {kind}" if kind else ""
        raise Fault(415, f"the body must be JSON: send Content-Type: application/json{said}", code="unsupported_media_type")
    if coding := request.headers.get("content-encoding"):
        raise Fault(415, f"the body must be sent as it is, not in Content-Encoding: {coding}", code="unsupported_media_type")
    too_large = Fault(413, f"the body is larger than {bound} bytes", code="payload_too_large")
    if int(request.headers.get("content-length", 0)) > PATIENCE * bound:
        raise too_large
    try:
        body = await asyncio.wait_for(_received(request, bound), TIME)
    except asyncio.TimeoutError:
        raise Fault(408, f"the body has not arrived in {TIME} s", code="timeout", headers={"Connection": "close"}) from None
    if body is None:
        raise too_large
    return body


async def _received(request: Request, bound: int) -> bytes | None:
    """What arrives; None if it is larger than the bound."""
    size, parts = 0, []
    async for part in request.stream():
        size += len(part)
        if size > PATIENCE * bound:
            break
        if size <= bound:
            parts.append(part)
    return b"".join(parts) if size <= bound else None
