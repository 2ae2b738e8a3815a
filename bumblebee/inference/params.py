"""How to choose the next tokens of one request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """Options of one request.

    Args:
        max_new_tokens: tokens to add at most.
        temperature: the logits are divided by it; 0 always takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens that together reach this probability (arXiv 1904.09751); 1 keeps all.
        min_p: keep tokens at least this share as likely as the most likely one; 0 keeps all.
        repetition_penalty: make tokens that are already there less likely (arXiv 1909.05858); 1 changes nothing.
        seed: of the random choice; null chooses anew each time.
        ignore_eos: go on after the end-of-text token.

    Raises:
        ValueError: a number out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        rules = [
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "more than 0"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")
