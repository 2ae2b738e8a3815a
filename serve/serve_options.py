"""Options of `bumblebee serve`. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from bumblebee.inference.engine_config import EngineConfig
from bumblebee.inference.sampling.sampling_params import SamplingParams


@dataclass
class ServeOptions:
    """Options of `bumblebee serve`, in addition to the sampling defaults.

    Args:
        model: model folder, or adapter folder, which is merged with its base model in memory.
        name: model name that clients send.
        host: address to listen on; 127.0.0.1 accepts local connections only, 0.0.0.0 all.
        port: port to listen on; 0 picks a free one.
        api_key: API key or keys, one of which clients send as a bearer token; null requires none.
        without_key: accept unauthenticated requests on a non-loopback address.
        device: auto, cpu, cuda or cuda:N; a list runs a copy of the model on each; the least busy one gets the next request.
        device_map: auto spreads the layers of a model that is too large for one GPU over all GPUs; null uses one device.
        dtype: auto (as stored), float32, bfloat16 or float16.
        quantize: int8 or int4 weights, quantized while loading; null keeps them as stored.
        trust_remote_code: run code that the model folder names or contains.
        system_prompt: system prompt of conversations without one.
        examples: example questions on the chat page; null for generic ones, [] for none.
        sampling: sampling defaults, fields of SamplingParams; they override the folder's generation_config.json.
        max_running: maximum number of running requests per device; others are queued.
        max_queue: maximum number of queued requests; further ones are rejected (429).
        max_payload: maximum size of a request body in bytes (413).
        context_length: maximum number of prompt and completion tokens together; longer prompts are rejected (400), longer
            completions end there; null uses the model's.
        request_timeout: seconds after which a request fails (504), including its time in the queue.
        heartbeat_timeout: seconds without a heartbeat after which a worker process hangs: its requests fail (500) and it is
            replaced. A busy worker sends heartbeats too.
        step_timeout: seconds after which an engine step that has not ended, such as in a GPU kernel, counts as hanging. A step
            computes up to step_tokens tokens: a slow device with many of them needs a larger value.
        drain_timeout: seconds to wait for running requests on shutdown.
        cache_tokens: size of each device's KV cache in tokens; null derives it from the free memory.
        step_tokens: maximum number of tokens per engine step.
        prefix_reuse: reuse the KV cache of earlier prompts with the same prefix.
        cuda_graphs: on a GPU, launch decode steps as CUDA graphs, captured when a batch size has been met a few times.
        log_level: log level; info logs each request.

    Raises:
        ValueError: a value out of its range.
    """

    model: str
    name: str = "bumblebee"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | list[str] | None = None
    without_key: bool = False
    device: str | list[str] = "auto"
    device_map: Literal["auto"] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Literal["int8", "int4"] | None = None
    trust_remote_code: bool = False
    system_prompt: str | None = None
    examples: list[str] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    max_running: int = 64
    max_queue: int = 256
    max_payload: int = 4 * 2**20
    context_length: int | None = None
    request_timeout: float = 600.0
    heartbeat_timeout: float = 15.0
    step_timeout: float = 300.0
    drain_timeout: float = 30.0
    cache_tokens: int | None = None
    step_tokens: int = 512
    prefix_reuse: bool = True
    cuda_graphs: bool = True
    log_level: Literal["debug", "info", "warning", "error"] = "warning"

    def __post_init__(self) -> None:
        rules = [
            ("name", bool(self.name.strip()), "non-empty"),
            ("examples", all(question.strip() for question in self.examples or []), "non-empty strings"),
            ("port", 0 <= self.port < 2**16, "between 0 and 65535"),
            ("max_queue", self.max_queue >= 0, "0 or more"),
            ("max_payload", self.max_payload >= 1, "at least 1"),
            ("context_length", self.context_length is None or self.context_length >= 2, "at least 2"),
            ("request_timeout", self.request_timeout > 0, "greater than 0"),
            ("heartbeat_timeout", self.heartbeat_timeout > 0, "greater than 0"),
            ("step_timeout", self.step_timeout > 0, "greater than 0"),
            ("drain_timeout", self.drain_timeout >= 0, "0 or more"),
        ]
        if self.device_map is not None and self.device not in ("auto", "cuda"):
            raise ValueError(f"device_map {self.device_map} uses all GPUs and cannot be combined with device {self.device}")
        SamplingParams(**self.sampling)  # validates the values
        _ = self.engine_config
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    @property
    def engine_config(self) -> EngineConfig:
        """Limits of each worker's engine."""
        return EngineConfig(self.cache_tokens, self.max_running, self.step_tokens, self.prefix_reuse, self.cuda_graphs)

    @property
    def heartbeat_interval(self) -> float:
        """Seconds between two heartbeats of a worker."""
        return min(1.0, self.heartbeat_timeout / 5)

    @property
    def devices(self) -> list[str]:
        """One device for each worker."""
        return [self.device] if isinstance(self.device, str) else self.device
