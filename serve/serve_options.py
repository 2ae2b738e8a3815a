"""What a server may be told: one dataclass, a docstring line per option. Torch is not imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from bumblebee.inference.engine_config import EngineConfig
from bumblebee.inference.sampling_params import SamplingParams


@dataclass
class ServeOptions:
    """Options of a server.

    Args:
        model: model folder, or an adapter folder: merged with its base model in memory.
        name: what clients call the model.
        host: address to listen on; 127.0.0.1 is this machine alone, 0.0.0.0 everybody who reaches it.
        port: to listen on; 0 takes a free one.
        api_key: who sends one of these as a bearer key may ask; null lets everybody.
        without_key: let everybody ask also where other machines reach the server.
        device: auto, cpu, cuda or cuda:N; a list gives each its own copy of the model, requests go to the least busy.
        device_map: auto spreads the layers of a model too large for one GPU over all; null puts it on one device.
        dtype: auto (the file's), float32, bfloat16 or float16.
        trust_remote_code: run code that the model's folder names or holds.
        system_prompt: what conversations begin with that bring no system prompt of their own.
        examples: questions that the chat page offers to begin with; null for some that suit any model, [] for none.
        sampling: defaults of requests by the names of SamplingParams; they win over the folder's generation_config.json.
        max_running: requests of a device that are computed at the same time; others wait.
        max_queue: requests that wait at most; further ones are refused (429).
        max_payload: bytes that a request's body may have (413).
        context_length: tokens that prompt and answer may have together (400); null for what the model takes.
        request_timeout: seconds after which a request ends with an error (504), its time in the queue included.
        drain_timeout: seconds that running answers have to come to their end when the server is stopped.
        cache_tokens: positions of each device's key-value cache; null chooses by the memory there is.
        step_tokens: tokens that a device computes in one step at most.
        prefix_reuse: do not compute again what an earlier request began with.
        log_level: what is written; info has a line for each request.

    Raises:
        ValueError: a number out of its range.
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
    trust_remote_code: bool = False
    system_prompt: str | None = None
    examples: list[str] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    max_running: int = 64
    max_queue: int = 256
    max_payload: int = 4 * 2**20
    context_length: int | None = None
    request_timeout: float = 600.0
    drain_timeout: float = 30.0
    cache_tokens: int | None = None
    step_tokens: int = 512
    prefix_reuse: bool = True
    log_level: Literal["debug", "info", "warning", "error"] = "warning"

    def __post_init__(self) -> None:
        rules = [
            ("name", bool(self.name.strip()), "a name"),
            ("examples", all(each.strip() for each in self.examples or []), "questions"),
            ("port", 0 <= self.port < 2**16, "between 0 and 65535"),
            ("max_queue", self.max_queue >= 0, "0 or more"),
            ("max_payload", self.max_payload >= 1, "at least 1"),
            ("context_length", self.context_length is None or self.context_length >= 2, "at least 2"),
            ("request_timeout", self.request_timeout > 0, "more than 0"),
            ("drain_timeout", self.drain_timeout >= 0, "0 or more"),
        ]
        if self.device_map is not None and self.device not in ("auto", "cuda"):
            raise ValueError(f"device_map: {self.device_map} takes all GPUs, device says {self.device}: leave one of them out")
        SamplingParams(**self.sampling)  # that their values can be, and those of the engine
        _ = self.limits
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    @property
    def limits(self) -> EngineConfig:
        """Of each worker's engine."""
        return EngineConfig(self.cache_tokens, self.max_running, self.step_tokens, self.prefix_reuse)

    @property
    def devices(self) -> list[str]:
        """One for each worker."""
        return [self.device] if isinstance(self.device, str) else self.device
