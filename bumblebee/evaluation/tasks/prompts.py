"""Prompts of questions: few-shot examples, with or without the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from bumblebee.evaluation.context import EvaluationContext

Example = tuple[str, str]  # question and right answer
T = TypeVar("T")


def examples_before(pool: Sequence[T], question: T | None, count: int) -> list[T]:
    """The first ``count`` records of a file other than the question itself: most prompts then begin alike, and share their
    computation."""
    return [record for record in pool[: count + 1] if record is not question][:count]


def plain_prompt(question: str, examples: Sequence[Example], separator: str) -> str:
    """Examples and question, separated by blank lines."""
    return "\n\n".join([*(f"{asked}{separator}{answer}" for asked, answer in examples), question])


def chat_ids(context: EvaluationContext, question: str, examples: Sequence[Example], system: str | None) -> list[int]:
    """Token ids of a chat that ends where the answer begins; the examples are its earlier turns."""
    turns = [
        turn
        for asked, answer in examples
        for turn in ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    ]
    return context.generator.encode_chat([*turns, {"role": "user", "content": question}], system=system)


def split_ids(context: EvaluationContext, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of what follows it, encoded together and cut after as many tokens as the prompt alone has.

    Spaces at the prompt's end belong to the continuation, whose first token usually begins with them. Both rules are those of
    lm-evaluation-harness.
    """
    tokenizer = context.generator.tokenizer
    stripped = prompt.rstrip(" ")
    continuation, prompt = prompt[len(stripped) :] + continuation, stripped
    before = tokenizer.prompt_ids(prompt) if prompt else list(tokenizer.prefix_ids)
    after = tokenizer.prompt_ids(prompt + continuation)[len(before) :]
    if not before:  # nothing precedes the text: the end of another one does in training
        before = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if token is not None][:1]
    return before, after
