"""EngineConfig and EngineStats: plain data, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EngineConfig:
    """Limits of an engine.

    Args:
        cache_tokens: positions of the KV cache, rounded up to whole blocks; null chooses by the available memory.
        max_running: requests that run at the same time; others wait.
        step_tokens: maximum tokens per step; long prompts are prefilled in chunks, next to the decode tokens of other requests.
        prefix_reuse: reuse cached blocks of earlier prompts with the same prefix.
        cuda_graphs: on a GPU, launch decode steps as CUDA graphs, captured when a batch size has been met a few times.

    Raises:
        ValueError: a number is below 1.
    """

    cache_tokens: int | None = None
    max_running: int = 64
    step_tokens: int = 512
    prefix_reuse: bool = True
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        for name in ("cache_tokens", "max_running", "step_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass
class EngineStats:
    """Current state of an engine, and totals since its start.

    Args:
        running: requests being computed.
        waiting: requests in the queue.
        blocks_total: blocks of the KV cache.
        blocks_free: blocks without content.
        blocks_cached: unused blocks kept for prompts with the same prefix.
        prompt_tokens: prompt tokens of all requests that have got their first new token, cached ones included.
        cached_tokens: of these, tokens taken from the prefix cache.
        new_tokens: tokens generated.
        steps: forward passes.
    """

    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    steps: int
