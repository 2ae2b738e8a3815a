"""What an engine may use, and what it has done: plain data. Torch is not imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class GenerationOptions:
    """Limits of an engine.

    Args:
        cache_tokens: positions of the key-value cache, rounded up to whole pages; null chooses by the memory there is.
        max_running: requests that grow at the same time; others wait.
        step_tokens: tokens computed in one step at most: a long prompt is computed in chunks beside the others' next tokens.
        prefix_reuse: do not compute again what an earlier request began with.

    Raises:
        ValueError: a number below 1.
    """

    cache_tokens: int | None = None
    max_running: int = 64
    step_tokens: int = 512
    prefix_reuse: bool = True

    def __post_init__(self) -> None:
        for name in ("cache_tokens", "max_running", "step_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass
class EngineStats:
    """Where an engine stands, and what it has done since it was made.

    Args:
        running: requests that are being computed.
        waiting: requests that are not yet.
        pages_total: pages of the key-value cache.
        pages_free: pages that hold nothing.
        pages_cached: pages that no request uses, kept for prompts that begin in the same way.
        prompt_tokens: tokens of the prompts that have got their first new token, the cached ones included.
        cached_tokens: how many of them were taken from the cache.
        new_tokens: tokens generated.
        steps: forward passes.
    """

    running: int
    waiting: int
    pages_total: int
    pages_free: int
    pages_cached: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    steps: int
