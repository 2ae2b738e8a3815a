"""What the server counts, for Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/).

A registry of its own: nothing of the process is mixed in. Names and units follow https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bumblebee.inference.engine_config import EngineStats

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)  # seconds
FURTHER = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)

GAUGES = {
    "running": "Requests that are being computed.",
    "waiting": "Requests that wait to be computed.",
    "pages_total": "Blocks of the KV cache.",
    "pages_free": "Empty blocks of the KV cache.",
    "pages_cached": "Unused blocks of the KV cache, kept for prompts with the same prefix.",
}
COUNTERS = {
    "prompt_tokens": "Tokens of the prompts that were begun, cached ones included.",
    "cached_tokens": "Tokens of prompts that were not computed again.",
    "new_tokens": "Tokens generated.",
    "steps": "Forward passes.",
}


class Metrics:
    """Counts of requests and times, and the engines' own figures.

    Args:
        stats: gives (index of the worker, its engine's figures).
    """

    def __init__(self, stats: Callable[[], Iterable[tuple[int, EngineStats]]]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("bumblebee_http_requests", "Requests answered.", ("route", "status"), registry=self._registry)
        self.first_token = Histogram(
            "bumblebee_first_token_seconds", "From the request to its first token.", buckets=FIRST, registry=self._registry
        )
        self.further_token = Histogram(
            "bumblebee_further_token_seconds", "Each token after the first.", buckets=FURTHER, registry=self._registry
        )
        self._registry.register(_Engines(stats))

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self._registry)


class _Engines(Collector):
    """The figures of the engines, at the moment at which they are asked for."""

    def __init__(self, stats: Callable[[], Iterable[tuple[int, EngineStats]]]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        families: list[tuple[str, Any]] = [
            *((name, GaugeMetricFamily(f"bumblebee_{name}", said, labels=["worker"])) for name, said in GAUGES.items()),
            *((name, CounterMetricFamily(f"bumblebee_{name}", said, labels=["worker"])) for name, said in COUNTERS.items()),
        ]
        for worker, stats in self._stats():
            for name, family in families:
                family.add_metric([str(worker)], getattr(stats, name.replace("pages_", "blocks_")))
        return [family for _, family in families]


class CountRequests:
    """ASGI middleware: counts the answers by route and status.

    Args:
        app: what answers.
        metrics: where they are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Paths that there are, and no others: anybody can invent some.
                route = getattr(scope.get("route"), "path", "none")
                self._metrics.requests.labels(route, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counted)
