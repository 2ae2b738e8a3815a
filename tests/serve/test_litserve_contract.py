"""The parts of LitServe that serve/ stands on. They are inner ones: with another version, look here first.

When this fails after an update of litserve: read the change, mend serve/server.py, loop.py or endpoints.py, then these tests.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import pytest
from litserve import LitAPI, LitServer
from litserve.loops.base import LitLoop
from litserve.loops.loops import inference_worker
from litserve.specs.base import LitSpec

TESTED = "0.2.19"


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_installed_version_is_the_one_that_was_read():
    assert version("litserve") == TESTED, (
        f"litserve {version('litserve')} is installed, serve/ was written against the inner parts of {TESTED}:"
        " install that one (pip install -c constraints.txt), or read what has changed and mend serve/"
    )


class WorkerLoop(LitLoop):
    """Tells what it is called with, and ends."""

    def run(self, *args: Any) -> None:
        raise SystemExit(args)


class Spec(LitSpec):
    def __init__(self) -> None:
        super().__init__()
        self.api_path = "/v1/chat/completions"
        self.calls: list[str] = []

    stream = True

    async def endpoint(self) -> None:
        """Answers nothing."""

    def pre_setup(self, lit_api: LitAPI) -> None:
        self.calls.append("pre_setup")
        self.add_endpoint("/ours", self.endpoint, ["GET"])

    def setup(self, server: Any) -> None:
        self.calls.append("setup")


class API(LitAPI):
    def setup(self, device: str) -> None:
        self.was_set_up_on = device

    def authorize(self) -> None:
        """Everybody may."""


class Server(LitServer):
    def _register_internal_endpoints(self) -> None:
        """None."""


def server(kind: type[Server] = Server) -> Server:
    return kind(API(loop=WorkerLoop(), spec=Spec()), accelerator="cpu", timeout=False, disable_openapi_url=True, middlewares=[])


def test_the_application_has_the_routes_of_the_spec_and_no_others():
    made = server()
    assert [route.path for route in made.app.routes] == ["/ours"], "no /docs, /openapi.json, /info or / of LitServe's own"
    assert [dependency.call.__name__ for dependency in made.app.routes[0].dependant.dependencies] == ["authorize"]


def test_a_worker_is_started_with_the_device_queue_and_transport_that_the_server_names(monkeypatch):
    started: dict[str, Any] = {}

    class Process:
        def __init__(self, target: Any, args: tuple[Any, ...], name: str) -> None:
            started.update(target=target, args=args)

        def start(self) -> None:
            started["began"] = True

    class Context:
        pass

    Context.Process = Process
    monkeypatch.setattr("litserve.server.mp.get_context", lambda kind: Context)
    made = server()
    made.devices, made.workers_setup_status, made._transport = ["cpu", "cuda:1"], {}, None
    made.litapi_request_queues["/v1/chat/completions"] = "pipe"
    made.launch_single_inference_worker(made.lit_api, 1)
    assert started["began"] and started["target"] is inference_worker
    lit_api, device, worker_id, request_queue, transport = started["args"][:5]
    assert (lit_api, device, worker_id, request_queue, transport) == (made.lit_api, "cuda:1", 1, "pipe", None)
    assert made.lit_api.spec.calls == ["pre_setup", "setup"]


def test_the_worker_sets_the_api_up_and_then_runs_the_loop_with_what_it_was_given():
    made = server()
    made._callback_runner.trigger_event = lambda *args, **rest: None
    try:
        inference_worker(made.lit_api, "cpu", 0, "pipe", None, {}, made._callback_runner, False)
    except SystemExit as ended:
        assert ended.code[:5] == (made.lit_api, "cpu", 0, "pipe", None)
    assert made.lit_api.was_set_up_on == "cpu"
    assert parameters(LitLoop.run)[1:6] == ["lit_api", "device", "worker_id", "request_queue", "transport"]


@pytest.mark.anyio
async def test_the_application_lives_within_the_lifespan_of_the_server():
    seen = []

    class Living(Server):
        @asynccontextmanager
        async def lifespan(self, app: Any) -> AsyncIterator[None]:
            seen.append("up")
            yield
            seen.append("down")

    made = server(Living)
    async with made.app.router.lifespan_context(made.app):
        assert seen == ["up"]
    assert seen == ["up", "down"]
