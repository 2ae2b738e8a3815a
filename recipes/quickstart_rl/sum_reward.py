"""The reward of `make quickstart-rl`: a Python function, named in grpo.yaml. docs/rl.md describes rewards."""

from __future__ import annotations

from collections.abc import Mapping


def correct_sum(prompts: list[str], completions: list[str], records: list[Mapping[str, object]]) -> list[float]:
    """1 for each completion that is the sum of the prompt's two numbers, otherwise 0."""
    return [float(is_correct(*each)) for each in zip(prompts, completions, strict=True)]


def is_correct(prompt: str, completion: str) -> bool:
    a, b = prompt.split("+")
    return completion == str(int(a) + int(b))
