"""An OpenAI-compatible server with scripted replies, for the tests of the chat page.

It serves the page as well. What a real server does by chance or under load (429, a dropped connection, a slow answer) it does
on demand, without a model.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve import chat_page

CONTEXT = 4096


@dataclass
class Reply:
    """One reply: streamed text, or an error.

    Args:
        text: the text, one word per chunk.
        status: HTTP status; other than 200, an error with `message` and `code`.
        pause: seconds before each chunk.
        drop: drop the connection after this many chunks.
        fault: end the stream with an error event with this message.
        prompt_tokens: prompt tokens in the usage; completion tokens are the chunks.
    """

    text: str = "Fine, thank you."
    status: int = 200
    message: str = ""
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0
    drop: int | None = None
    fault: str | None = None
    finish: str = "stop"
    prompt_tokens: int = 11

    def pieces(self) -> list[str]:
        words = self.text.split(" ")
        return [*(f"{word} " for word in words[:-1]), words[-1]]


class ScriptedServer:
    """The next `replies`, and the requests so far."""

    url: str

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.replies: deque[Reply] = deque()
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.key = ""  # required if set
        self.ready = True
        self.examples: list[str] | None = None
        self.left = 0  # aborted responses

    def app(self) -> Starlette:
        answer = [Route(f"/v1/{name}", self._answer, methods=["POST"]) for name in ("chat/completions", "completions")]
        return Starlette(
            routes=[*chat_page.routes(), Route("/v1/models", self._models), Route("/ready", self._ready), *answer],
        )

    async def _models(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        card = {"id": "bumblebee", "object": "model", "max_model_len": CONTEXT, "defaults": {"temperature": 0.7}}
        if self.examples is not None:
            card["examples"] = self.examples
        return JSONResponse({"object": "list", "data": [card]})

    async def _ready(self, request: Request) -> Response:
        return JSONResponse({}, 200) if self.ready else error(Reply(status=503, message="The model is loading"))

    async def _answer(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        if not self.ready:
            return error(Reply(status=503, message="The model is loading", headers={"Retry-After": "1"}))
        self.paths.append(request.url.path)
        self.bodies.append(await request.json())
        reply = self.replies.popleft() if self.replies else Reply()
        if reply.status != 200:
            return error(reply)
        return StreamingResponse(self._stream(reply, "chat" in request.url.path), media_type="text/event-stream")

    def _refused(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return error(Reply(status=401, message="wrong API key", code="invalid_api_key"))
        return None

    async def _stream(self, reply: Reply, chat: bool) -> AsyncIterator[str]:
        pieces = reply.pieces()
        try:
            for index, piece in enumerate(pieces):
                if index == reply.drop:
                    await asyncio.sleep(0.2)  # lets the earlier chunks arrive
                    raise ConnectionResetError("as the test asked")
                await asyncio.sleep(reply.pause)
                yield event(choice(chat, piece))
        except asyncio.CancelledError:
            self.left += 1
            raise
        if reply.fault:
            yield event({"error": {"message": reply.fault, "type": "server_error", "param": None, "code": None}})
            return
        yield event(choice(chat, "", reply.finish))
        usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": len(pieces)}
        yield event({"model": "bumblebee", "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"


def choice(chat: bool, text: str, finish: str | None = None) -> dict[str, Any]:
    content = {"delta": {"content": text}} if chat else {"text": text}
    return {"model": "bumblebee", "choices": [{"index": 0, **content, "finish_reason": finish}]}


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def error(reply: Reply) -> Response:
    body = {"error": {"message": reply.message, "type": "error", "param": None, "code": reply.code}}
    return JSONResponse(body, reply.status, reply.headers)


@contextmanager
def running() -> Iterator[ScriptedServer]:
    """Run the server on a free port, in a thread."""
    scripted = ScriptedServer()
    config = uvicorn.Config(scripted.app(), port=0, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    started = threading.Event()
    startup = server.startup

    async def startup_and_signal(sockets: Any = None) -> None:
        await startup(sockets)
        started.set()

    server.startup = startup_and_signal  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(20), "the scripted server did not start"
    scripted.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield scripted
    finally:
        server.should_exit = True
        thread.join(10)
