"""The routes, as LitServe wants them: a LitSpec.

Bodies are checked in ``schemas``, prompts made in ``prompts``, answers written in ``replies``; between them the hub lets the
workers compute.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any, TypeVar

from litserve.specs.base import LitSpec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from bumblebee.inference.request import RequestOutput
from bumblebee.tokenizer.tokenizer import Tokenizer
from serve import body as bodies
from serve.api_errors import Fault, invalid
from serve.engine_client import Hub, Run, loading
from serve.requests import Job, Prompts
from serve.responses import ChatReply, CompletionReply
from serve.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, parse
from serve.serve_options import ServeOptions
from serve.worker_messages import Ready

# Defaults that the model's card tells, so that a client can show what a request without them gets.
SHOWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
LARGE = 64 * 2**10  # bytes of a body that takes some milliseconds to read

Reply = ChatReply | CompletionReply
Result = TypeVar("Result")
Body = TypeVar("Body", ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)


class Endpoints(LitSpec):
    """OpenAI's routes, and a few around them.

    Args:
        options: the server's.
        tokenizer: the model's.
        hub: runs what is asked.
    """

    def __init__(self, options: ServeOptions, tokenizer: Tokenizer, hub: Hub) -> None:
        super().__init__()
        self.api_path = "/v1/chat/completions"  # LitServe asks for one
        self.options, self.tokenizer, self.hub = options, tokenizer, hub
        self.prompts: Prompts | None = None
        self.created = int(time.time())
        self._large = ThreadPoolExecutor(1, "large-bodies")  # one may take a second, and half a gigabyte

    # -- what LitServe calls -------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """A worker gets nothing of this but the path, by which LitServe names things."""
        return {"api_path": self.api_path}

    @property
    def stream(self) -> bool:
        """Whether answers come in pieces."""
        return True

    def pre_setup(self, lit_api: Any) -> None:
        """Name the routes that need a key, where there is one."""
        self.add_endpoint(self.api_path, self.chat, ["POST"])
        self.add_endpoint("/v1/completions", self.completion, ["POST"])
        self.add_endpoint("/v1/models", self.models, ["GET"])
        self.add_endpoint("/v1/models/{id:path}", self.model, ["GET"])
        self.add_endpoint("/tokenize", self.tokenize, ["POST"])
        self.add_endpoint("/detokenize", self.detokenize, ["POST"])
        self.add_endpoint("/metrics", self.metrics, ["GET"])

    def setup(self, server: Any) -> None:
        """Called whenever a worker is started; nothing of LitServe's queues is needed here."""

    # -- answers -------------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = await self._body(request, ChatRequest)
        self.hub.admit()  # before anything is computed for a request that is refused
        prompts = self._prompts()
        jobs = await self._in_thread(request, prompts.chat, body)
        return await self._answer(request, body, jobs, ChatReply(body, self.options.name, self.tokenizer, prompts.calls))

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = await self._body(request, CompletionRequest)
        self.hub.admit()
        prompts = self._prompts()
        jobs = await self._in_thread(request, prompts.completion, body)
        echoes = [prompts.echo(prompt) for prompt in body.prompt] if body.echo else None
        return await self._answer(request, body, jobs, CompletionReply(body, self.options.name, self.tokenizer, echoes))

    async def _answer(
        self, request: Request, body: ChatRequest | CompletionRequest, jobs: Sequence[Job], reply: Reply
    ) -> Response:
        run = self.hub.run(jobs)
        if body.stream:
            return await streamed(request, run, reply)
        with closing(run):
            await unless_left(request, fed(reply, run))
        return JSONResponse(reply.whole())

    # -- around them ---------------------------------------------------------------------------------------------------

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: the ids of a prompt."""
        body = await self._body(request, TokenizeRequest)
        prompts = self._prompts()
        ids = await self._in_thread(request, prompts.tokenize, body)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": prompts.context_length})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: the text of ids."""
        body = await self._body(request, DetokenizeRequest)
        prompts = self._prompts()
        if unknown := [id for id in body.tokens if id >= prompts.vocab_size]:
            raise invalid(f"{unknown[0]} is no token id of this model", "tokens")
        return JSONResponse({"prompt": await self._in_thread(request, self.tokenizer.decode, body.tokens)})

    async def models(self, request: Request) -> Response:
        """GET /v1/models: there is one."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request, id: str) -> Response:
        """GET /v1/models/{id}."""
        self._require_known(id)
        return JSONResponse(self._card())

    async def metrics(self, request: Request) -> Response:
        """GET /metrics, for Prometheus."""
        return Response(self.hub.metrics.text(), media_type="text/plain; version=0.0.4")

    async def health(self, request: Request) -> Response:
        """GET /health: the server's process is alive."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /ready: requests are answered."""
        state = self.hub.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    def loaded(self, ready: Ready) -> None:
        """Take what a worker says about the model."""
        given = self.options.sampling
        self.prompts = Prompts(
            self.tokenizer,
            min(ready.context_length, self.options.context_length or ready.context_length),
            ready.vocab_size,
            replace(ready.defaults, **given),
            self.options.system_prompt,
            given.get("max_new_tokens"),
        )

    def _prompts(self) -> Prompts:
        if self.prompts is None:
            raise loading()
        return self.prompts

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        raw = await bodies.read(request, self.options.max_payload)
        request.state.large = len(raw) > LARGE
        body = await self._in_thread(request, parse, kind, raw) if request.state.large else parse(kind, raw)
        if body.model is not None:
            self._require_known(body.model)
        return body

    async def _in_thread(self, request: Request, function: Callable[..., Result], *arguments: Any) -> Result:
        """What a function gives. Running streams go on meanwhile, and so do small requests: the large ones take turns.

        Raises:
            ClientDisconnect: the client of a large one has left.
        """
        if not request.state.large:
            return await asyncio.to_thread(function, *arguments)
        return await unless_left(request, asyncio.get_running_loop().run_in_executor(self._large, function, *arguments))

    def _require_known(self, model: str) -> None:
        if model != self.options.name:
            said = f"there is no model {model!r}; this server's is {self.options.name!r}"
            raise Fault(404, said, param="model", code="model_not_found")

    def _card(self) -> dict[str, Any]:
        card = {"id": self.options.name, "object": "model", "created": self.created, "owned_by": "bumblebee"}
        if self.options.examples is not None:
            card["examples"] = self.options.examples
        if self.prompts:
            defaults = {name: getattr(self.prompts.defaults, name) for name in SHOWN}
            card |= {"max_model_len": self.prompts.context_length, "defaults": defaults}
        return card


# -- streams -------------------------------------------------------------------------------------------------------------


class EventStream(StreamingResponse):
    """Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html); its end is the run's end.

    Args:
        content: the events.
        run: what they are made of.
    """

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[str], run: Run) -> None:
        # The second header asks proxies not to hold events back.
        super().__init__(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them; also where the client leaves, nothing is computed for it any more."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._run.close()


async def streamed(request: Request, run: Run, reply: Reply) -> EventStream:
    """The stream of a reply. It begins with the first output: an error before that has a status of its own."""
    try:
        index, first = await unless_left(request, anext(run))
    except BaseException:
        run.close()
        raise
    return EventStream(events(run, reply, index, first), run)


async def events(run: Run, reply: Reply, index: int, first: RequestOutput) -> AsyncIterator[str]:
    """A reply's chunks as events. An error in the middle is the last of them: the status has been sent."""
    yield written([*reply.begin(), *reply.add(index, first)])
    try:
        async for place, output in run:
            if chunks := reply.add(place, output):
                yield written(chunks)
    except Fault as fault:
        yield written([fault.body()])
        return
    yield written(reply.end()) + "data: [DONE]\n\n"


def written(chunks: Sequence[Any]) -> str:
    """Chunks as events."""
    return "".join(f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n" for chunk in chunks)


async def fed(reply: Reply, run: Run) -> None:
    """Give a reply all that comes."""
    async for index, output in run:
        reply.add(index, output)


async def unless_left(request: Request, work: Awaitable[Result]) -> Result:
    """What ``work`` gives, if the client waits for it.

    Raises:
        ClientDisconnect: it has left; the work is cancelled.
    """
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        left.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
