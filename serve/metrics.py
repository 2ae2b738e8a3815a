"""What the server counts, for Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/).

A registry of its own: nothing of the process is mixed in. Names and units follow https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bumblebee.inference.engine_config import EngineStats

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)  # histogram buckets in seconds
FURTHER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)  # seconds

# Metric name -> field of EngineStats and help text.
GAUGES = {
    "running": ("running", "Requests that are running."),
    "waiting": ("waiting", "Requests that are queued."),
    "pages_total": ("blocks_total", "Blocks of the KV cache."),
    "pages_free": ("blocks_free", "Unused blocks of the KV cache."),
    "pages_cached": ("blocks_cached", "Blocks that no request uses, kept for prompts with the same prefix."),
}
COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens processed, including cached ones."),
    "cached_tokens": ("cached_tokens", "Prompt tokens taken from the prefix cache."),
    "new_tokens": ("new_tokens", "Tokens generated."),
    "steps": ("steps", "Engine steps, one forward pass each."),
}


class Metrics:
    """Request counts, latencies, and the engines' statistics.

    Args:
        stats: returns (worker index, engine statistics) of each worker.
    """

    def __init__(self, stats: Callable[[], Iterable[tuple[int, EngineStats]]]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("bumblebee_http_requests", "HTTP responses.", ("route", "status"), registry=self._registry)
        self.time_to_first_token = Histogram(
            "bumblebee_first_token_seconds",
            "Time from the request to its first token.",
            buckets=FIRST_TOKEN,
            registry=self._registry,
        )
        self.time_per_further_token = Histogram(
            "bumblebee_further_token_seconds",
            "Time per token after the first.",
            buckets=FURTHER_TOKEN,
            registry=self._registry,
        )
        self._registry.register(_EngineCollector(stats))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


Family = GaugeMetricFamily | CounterMetricFamily


def _family(kind: type[Family], name: str, text: str) -> Family:
    return kind(f"bumblebee_{name}", text, labels=["worker"])


class _EngineCollector(Collector):
    """Reads the engines' statistics when the metrics are scraped."""

    def __init__(self, stats: Callable[[], Iterable[tuple[int, EngineStats]]]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        gauges = [(attribute, _family(GaugeMetricFamily, name, text)) for name, (attribute, text) in GAUGES.items()]
        counters = [(attribute, _family(CounterMetricFamily, name, text)) for name, (attribute, text) in COUNTERS.items()]
        families = [*gauges, *counters]
        for worker, stats in self._stats():
            for attribute, family in families:
                family.add_metric([str(worker)], getattr(stats, attribute))
        return [family for _, family in families]


class RequestCountMiddleware:
    """ASGI middleware that counts responses by route and status.

    Args:
        app: the next ASGI application.
        metrics: the server's.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_and_count(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Label with known routes only: clients can request any number of other paths.
                route = getattr(scope.get("route"), "path", "none")
                self._metrics.requests.labels(route, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, send_and_count)
