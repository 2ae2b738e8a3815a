"""The bytes of a request's body: JSON, and no more than a bound."""

from __future__ import annotations

from starlette.requests import Request

from serve.faults import Fault

PATIENCE = 4  # bodies up to so many bounds are read to their end: a client that still sends would not see the answer


async def read(request: Request, bound: int) -> bytes:
    """The body of a request.

    Args:
        request: whose body has not been read.
        bound: bytes that it may have.

    Raises:
        Fault: 415, it does not say that it is plain JSON; 413, it is too large.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        said = f", not {kind}" if kind else ""
        raise Fault(415, f"the body must be JSON: send Content-Type: application/json{said}", code="unsupported_media_type")
    if coding := request.headers.get("content-encoding"):
        raise Fault(415, f"the body must be sent as it is, not in Content-Encoding: {coding}", code="unsupported_media_type")
    size, parts = 0, []
    too_large = Fault(413, f"the body is larger than {bound} bytes", code="payload_too_large")
    if int(request.headers.get("content-length", 0)) > PATIENCE * bound:
        raise too_large
    async for part in request.stream():
        size += len(part)
        if size > PATIENCE * bound:
            break
        if size <= bound:
            parts.append(part)
    if size > bound:
        raise too_large
    return b"".join(parts)
