"""The HTTP routes, as a LitSpec.

Each handler parses the body (``schemas``), builds engine requests (``requests``), lets the engine client run them, and builds
the response from their outputs (``responses``, ``streaming``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import TypeVar

from litserve import LitAPI, LitServer
from litserve.specs.base import LitSpec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bumblebee.tokenizer.tokenizer import Tokenizer
from serve.api.errors import APIError, invalid
from serve.api.requests import ChoiceRequest, RequestBuilder
from serve.api.responses import ChatResponseBuilder, CompletionResponseBuilder
from serve.api.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, parse
from serve.api.streaming import ResponseBuilder, collect, stream_response, unless_disconnected
from serve.http_limits import read_json_body
from serve.serve_options import ServeOptions
from serve.workers.engine_client import EngineClient, model_loading
from serve.workers.messages import WorkerReady

# Sampling defaults in the model card, so that a client can display them.
CARD_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
LARGE_BODY = 64 * 2**10  # bytes; parsing a larger body takes some milliseconds

Result = TypeVar("Result")
Body = TypeVar("Body", ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)


class Endpoints(LitSpec):
    """OpenAI's routes, and routes for tokens, metrics, liveness and readiness.

    Args:
        options: the server's.
        tokenizer: the model's.
        engine_client: runs the requests.
    """

    def __init__(self, options: ServeOptions, tokenizer: Tokenizer, engine_client: EngineClient) -> None:
        super().__init__()
        self.api_path = "/v1/chat/completions"  # required by LitServe
        self.options, self.tokenizer, self.engine_client = options, tokenizer, engine_client
        self.requests: RequestBuilder | None = None  # set when a worker has loaded the model
        self.created = int(time.time())
        self._large_bodies = ThreadPoolExecutor(1, "large-bodies")  # each may take a second, and half a gigabyte

    # -- called by LitServe ----------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, object]:
        """Only the path is sent to a worker process, where LitServe uses it as a name."""
        return {"api_path": self.api_path}

    @property
    def stream(self) -> bool:
        """Whether responses can be streamed."""
        return True

    def pre_setup(self, lit_api: LitAPI) -> None:
        """Register the routes that require an API key, if there is one."""
        self.add_endpoint(self.api_path, self.chat, ["POST"])
        self.add_endpoint("/v1/completions", self.completion, ["POST"])
        self.add_endpoint("/v1/models", self.models, ["GET"])
        self.add_endpoint("/v1/models/{id:path}", self.model, ["GET"])
        self.add_endpoint("/tokenize", self.tokenize, ["POST"])
        self.add_endpoint("/detokenize", self.detokenize, ["POST"])
        self.add_endpoint("/tokenizer_info", self.tokenizer_info, ["GET"])
        self.add_endpoint("/metrics", self.metrics, ["GET"])

    def setup(self, server: LitServer) -> None:
        """Called whenever a worker is started; LitServe's queues are not used."""

    # -- chat and completions --------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = await self._body(request, ChatRequest)
        self.engine_client.admit()  # before the prompt of a request that would be rejected is tokenized
        requests = self._require_model()
        choices = await self._in_thread(request, requests.chat, body)
        response = ChatResponseBuilder(body, self.options.name, self.tokenizer, requests.tool_call_format)
        return await self._respond(request, body, choices, response)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = await self._body(request, CompletionRequest)
        self.engine_client.admit()
        requests = self._require_model()
        choices = await self._in_thread(request, requests.completion, body)
        echoes = [requests.echo(prompt) for prompt in body.prompt] if body.echo else None
        response = CompletionResponseBuilder(body, self.options.name, self.tokenizer, echoes)
        return await self._respond(request, body, choices, response)

    async def _respond(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        choices: Sequence[ChoiceRequest],
        response: ResponseBuilder,
    ) -> Response:
        response.prompt_tokens = [len(choice.prompt) for choice in choices]
        outputs = self.engine_client.generate(choices)
        if body.stream:
            return await stream_response(request, outputs, response)
        with closing(outputs):
            await unless_disconnected(request, collect(response, outputs))
        return JSONResponse(response.body())

    # -- other routes ----------------------------------------------------------------------------------------------------

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: the token ids of a prompt."""
        body = await self._body(request, TokenizeRequest)
        requests = self._require_model()
        ids = await self._in_thread(request, requests.tokenize, body)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": requests.context_length})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: the text of token ids."""
        body = await self._body(request, DetokenizeRequest)
        requests = self._require_model()
        if unknown := [id for id in body.tokens if id >= requests.vocab_size]:
            raise invalid(f"Invalid token id {unknown[0]}: the vocabulary size is {requests.vocab_size}", "tokens")
        skip = bool(body.skip_special_tokens)
        return JSONResponse({"prompt": await self._in_thread(request, self.tokenizer.decode, body.tokens, skip)})

    async def tokenizer_info(self, request: Request) -> Response:
        """GET /tokenizer_info: the special tokens and the chat template, for clients that tokenize through the server."""
        named = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token")) | self.tokenizer.special_tokens
        try:
            template = self.tokenizer.chat_template.sources.get("default")
        except ValueError:  # the model only completes texts
            template = None
        return JSONResponse({**named, "chat_template": template})

    async def models(self, request: Request) -> Response:
        """GET /v1/models: a list of one model."""
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request, id: str) -> Response:
        """GET /v1/models/{id}."""
        self._check_model_name(id)
        return JSONResponse(self._model_card())

    async def metrics(self, request: Request) -> Response:
        """GET /metrics, for Prometheus."""
        return Response(self.engine_client.metrics.text(), media_type="text/plain; version=0.0.4")

    async def health(self, request: Request) -> Response:
        """GET /health, the liveness probe: the server process is running, and its workers have not all been lost."""
        lost = self.engine_client.state == "restarting"
        return JSONResponse({"status": "restarting" if lost else "ok"}, 503 if lost else 200)

    async def ready(self, request: Request) -> Response:
        """GET /ready, the readiness probe: requests are accepted."""
        state = self.engine_client.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    def on_ready(self, ready: WorkerReady) -> None:
        """Called when a worker has loaded the model."""
        sampling = self.options.sampling
        self.requests = RequestBuilder(
            self.tokenizer,
            min(ready.context_length, self.options.context_length or ready.context_length),
            ready.vocab_size,
            replace(ready.defaults, **sampling),
            self.options.system_prompt,
            sampling.get("max_new_tokens"),
        )

    def _require_model(self) -> RequestBuilder:
        if self.requests is None:
            raise model_loading()
        return self.requests

    async def _body(self, request: Request, schema: type[Body]) -> Body:
        raw = await read_json_body(request, self.options.max_payload)
        request.state.large = len(raw) > LARGE_BODY
        body = await self._in_thread(request, parse, schema, raw) if request.state.large else parse(schema, raw)
        if body.model is not None:
            self._check_model_name(body.model)
        return body

    async def _in_thread(self, request: Request, function: Callable[..., Result], *args: object) -> Result:
        """Call a function in a thread, so that running streams continue. Large requests run one at a time, apart from others.

        Raises:
            ClientDisconnect: the client of a large request has disconnected.
        """
        if not request.state.large:
            return await asyncio.to_thread(function, *args)
        future = asyncio.get_running_loop().run_in_executor(self._large_bodies, function, *args)
        return await unless_disconnected(request, future)

    def _check_model_name(self, model: str) -> None:
        if model != self.options.name:
            message = f"The model {model!r} does not exist; this server serves {self.options.name!r}"
            raise APIError(404, message, param="model", code="model_not_found")

    def _model_card(self) -> dict[str, object]:
        card: dict[str, object] = {
            "id": self.options.name, "object": "model", "created": self.created, "owned_by": "bumblebee",
        }  # fmt: skip
        if self.options.examples is not None:
            card["examples"] = self.options.examples
        if self.requests:
            defaults = {name: getattr(self.requests.defaults, name) for name in CARD_DEFAULTS}
            card |= {"max_model_len": self.requests.context_length, "defaults": defaults}
        return card
