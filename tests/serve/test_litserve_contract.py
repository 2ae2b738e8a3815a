"""The internals of LitServe that serve/ relies on; they may change with every release.

If this fails after an update of litserve, read its changes, adapt serve/server.py, worker.py or endpoints.py, then these tests.
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


def test_installed_version_is_the_tested_one():
    assert version("litserve") == TESTED, (
        f"litserve {version('litserve')} is installed, but serve/ relies on internals of {TESTED}:"
        " install that one (pip install -c constraints.txt), or read its changes and adapt serve/"
    )


class WorkerLoop(LitLoop):
    """Exits with its arguments."""

    def run(self, *args: Any) -> None:
        raise SystemExit(args)


class Spec(LitSpec):
    def __init__(self) -> None:
        super().__init__()
        self.api_path = "/v1/chat/completions"
        self.calls: list[str] = []

    stream = True

    async def endpoint(self) -> None:
        """Does nothing."""

    def pre_setup(self, lit_api: LitAPI) -> None:
        self.calls.append("pre_setup")
        self.add_endpoint("/ours", self.endpoint, ["GET"])

    def setup(self, server: Any) -> None:
        self.calls.append("setup")


class API(LitAPI):
    def setup(self, device: str) -> None:
        self.device_of_setup = device

    def authorize(self) -> None:
        """Accepts every request."""


class Server(LitServer):
    def _register_internal_endpoints(self) -> None:
        """Registers none."""


def server(kind: type[Server] = Server) -> Server:
    return kind(API(loop=WorkerLoop(), spec=Spec()), accelerator="cpu", timeout=False, disable_openapi_url=True, middlewares=[])


def test_application_has_only_the_routes_of_the_spec():
    instance = server()
    assert [route.path for route in instance.app.routes] == ["/ours"], (
        "LitServe's own /docs, /openapi.json, /info and / are not there"
    )
    assert [dependency.call.__name__ for dependency in instance.app.routes[0].dependant.dependencies] == ["authorize"]


def test_worker_gets_device_queue_and_transport(monkeypatch):
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
    instance = server()
    instance.devices, instance.workers_setup_status, instance._transport = ["cpu", "cuda:1"], {}, None
    instance.litapi_request_queues["/v1/chat/completions"] = "pipe"
    instance.launch_single_inference_worker(instance.lit_api, 1)
    assert started["began"] and started["target"] is inference_worker
    lit_api, device, worker_id, request_queue, transport = started["args"][:5]
    assert (lit_api, device, worker_id, request_queue, transport) == (instance.lit_api, "cuda:1", 1, "pipe", None)
    assert instance.lit_api.spec.calls == ["pre_setup", "setup"]


def test_worker_calls_setup_and_then_the_loop():
    instance = server()
    instance._callback_runner.trigger_event = lambda *args, **rest: None
    try:
        inference_worker(instance.lit_api, "cpu", 0, "pipe", None, {}, instance._callback_runner, False)
    except SystemExit as ended:
        assert ended.code[:5] == (instance.lit_api, "cpu", 0, "pipe", None)
    assert instance.lit_api.device_of_setup == "cpu"
    assert parameters(LitLoop.run)[1:6] == ["lit_api", "device", "worker_id", "request_queue", "transport"]


@pytest.mark.anyio
async def test_application_runs_within_the_lifespan():
    seen = []

    class Living(Server):
        @asynccontextmanager
        async def lifespan(self, app: Any) -> AsyncIterator[None]:
            seen.append("up")
            yield
            seen.append("down")

    instance = server(Living)
    async with instance.app.router.lifespan_context(instance.app):
        assert seen == ["up"]
    assert seen == ["up", "down"]
