"""SampledText: what a model has written while it is trained, for people to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class SampledText:
    """A prompt and how the model went on.

    Args:
        prompt: the prompt, or the question in it.
        text: the model's completion, without special tokens.
        title: "sample"; "best" or "worst" of the completions that a step trains on.
        reward: of the completion; None where nothing rewards it.
        rewards: of each reward function, by name.
    """

    prompt: str
    text: str
    title: str = "sample"
    reward: float | None = None
    rewards: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    def to_json(self) -> dict[str, object]:
        """As in samples.jsonl."""
        if self.reward is None:
            return {"prompt": self.prompt, "text": self.text}
        return {
            "title": self.title, "prompt": self.prompt, "text": self.text,
            "reward": self.reward, "rewards": dict(self.rewards),
        }  # fmt: skip

    @property
    def score(self) -> str:
        """``reward 1.2 (NumericAnswer 1, Matches 1)``; empty without one."""
        if self.reward is None:
            return ""
        parts = ", ".join(f"{name} {value:.4g}" for name, value in self.rewards.items())
        return f"reward {self.reward:.4g}" + (f" ({parts})" if len(self.rewards) > 1 else "")
