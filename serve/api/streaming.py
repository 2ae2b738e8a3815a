"""Streamed responses as server-sent events, and cancellation of the work for disconnected clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from bumblebee.inference.request import RequestOutput
from serve.api.errors import APIError
from serve.api.responses import ChatResponseBuilder, CompletionResponseBuilder, JSONObject
from serve.workers.engine_client import OutputStream

ResponseBuilder = ChatResponseBuilder | CompletionResponseBuilder
Result = TypeVar("Result")
LONG_PROMPT = 1000  # tokens


class EventStream(StreamingResponse):
    """Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html).

    Args:
        content: the events.
        outputs: closed when the response ends.
    """

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[str], outputs: OutputStream) -> None:
        # X-Accel-Buffering asks proxies not to buffer the events.
        super().__init__(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._outputs = outputs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events. If the client disconnects, its requests are cancelled."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._outputs.close()


async def stream_response(request: Request, outputs: OutputStream, response: ResponseBuilder) -> EventStream:
    """Start a streamed response after the first output: an error before that gets its own status."""
    try:
        index, first = await unless_disconnected(request, anext(outputs))
    except BaseException:
        outputs.close()
        raise
    return EventStream(event_stream(outputs, response, index, first), outputs)


async def event_stream(
    outputs: OutputStream, response: ResponseBuilder, index: int, first: RequestOutput
) -> AsyncIterator[str]:
    """The chunks of a response as events. An error is sent as the last event, because the status has been sent already."""
    yield to_events([*response.first_chunks(), *await add_output(response, outputs, index, first)])
    try:
        async for choice, output in outputs:
            if chunks := await add_output(response, outputs, choice, output):
                yield to_events(chunks)
    except APIError as error:
        yield to_events([error.body()])
        return
    yield to_events(response.last_chunks()) + "data: [DONE]\n\n"


def to_events(chunks: Sequence[object]) -> str:
    """Encode chunks as server-sent events."""
    return "".join(f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n" for chunk in chunks)


async def collect(response: ResponseBuilder, outputs: OutputStream) -> None:
    """Add all outputs to a response."""
    async for index, output in outputs:
        await add_output(response, outputs, index, output)


async def add_output(response: ResponseBuilder, outputs: OutputStream, index: int, output: RequestOutput) -> list[JSONObject]:
    """Add an output to a response and return the chunks for a stream. A choice that is complete is generated no further.

    The log probabilities of a long prompt take a while: they are written in a thread.
    """
    if len(output.prompt_logprobs or ()) > LONG_PROMPT:
        chunks = await asyncio.to_thread(response.add, index, output)
    else:
        chunks = response.add(index, output)
    if output.finish_reason is None and response.finish_reasons[index] is not None:
        outputs.end(index)
    return chunks


async def unless_disconnected(request: Request, work: Awaitable[Result]) -> Result:
    """Await ``work`` as long as the client stays connected.

    Raises:
        ClientDisconnect: the client has disconnected; the work is cancelled.
    """
    task, disconnected = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((task, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        disconnected.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
