"""Texts: the answers to many prompts as JSON Lines, one object for each answer.

    {... the prompt's record ..., "text": ..., "finish_reason": ..., "prompt_tokens": 5, "new_tokens": 64}

With several answers to each prompt "sample" counts them from 0; with log probabilities there are "logprobs". All prompts are
checked before the first is computed. A line is written as a whole, when all before it are, so that an interrupted run leaves
the answers to the first prompts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

from tqdm import tqdm

from bumblebee.formatting import short
from bumblebee.inference.generator import Generation, Generator
from bumblebee.inference.prompt_record import PromptRecord
from bumblebee.inference.request import Request, Token
from bumblebee.inference.sampling_params import SamplingParams

WRITTEN = ("sample", "text", "finish_reason", "prompt_tokens", "new_tokens", "logprobs")
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} texts [{elapsed}, {remaining} left{postfix}]"


class Texts:
    """What a model says to some prompts.

    Args:
        generator: the model.
        prompts: at least one.
        params: how to choose tokens. With a seed, each prompt's n-th answer has the seed ``seed + n``.
        num_samples: answers to each prompt.
        chat: put texts into the tokenizer's chat template, as a question; messages always are.
        system: system prompt of chats that bring none.

    Raises:
        ValueError: a prompt that cannot be continued; the message begins with its place.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Iterable[PromptRecord],
        params: SamplingParams,
        num_samples: int = 1,
        chat: bool = False,
        system: str | None = None,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        seeds = [None if params.seed is None else params.seed + sample for sample in range(num_samples)]
        self.generator, self.num_samples = generator, num_samples
        self.records: list[dict[str, Any]] = []
        self.requests: list[Request] = []
        for prompt in prompts:
            ids = _ids(generator, prompt, params, chat, system)
            is_chat = chat or not isinstance(prompt.content, str)
            chosen = params.ending_with(generator.tokenizer.end_of_turn_ids) if is_chat else params
            self.records.append(prompt.record)
            for seed in seeds:
                self.requests.append(Request(str(len(self.requests)), ids, replace(chosen, seed=seed)))
        if not self.records:
            raise ValueError("prompts: the file has none")

    def write(self, file: BinaryIO) -> None:
        """Compute all answers and write them, in the prompts' order, each as soon as those before it are there."""
        with tqdm(total=len(self.requests), bar_format=BAR, disable=None, leave=False) as bar:
            for number, generation in enumerate(_in_order(self._finished(bar))):
                file.write(self._line(number, generation))
                file.flush()

    def print(self, before: str, stream: bool = True) -> None:
        """Print the only answer behind some text, as it comes or at once."""
        [request] = self.requests
        pieces = (output.text for output in self.generator.outputs([request]))
        print(before, end="", flush=True)
        for piece in pieces if stream else ["".join(pieces)]:
            print(piece, end="", flush=True)
        print()

    def _finished(self, bar: Any) -> Iterator[tuple[int, Generation]]:
        """Answers as they end, with their numbers."""
        growing: dict[str, Generation] = {}
        tokens, started = 0, monotonic()
        for output in self.generator.outputs(self.requests):
            generation = growing.setdefault(output.id, Generation("", [], "length"))
            generation.add(output)
            tokens += len(output.tokens)
            if not bar.disable:
                bar.set_postfix_str(f"{short(tokens / max(monotonic() - started, 1e-9))} tokens/s", refresh=False)
            if output.finish_reason is not None:
                bar.update()
                yield int(output.id), growing.pop(output.id)

    def _line(self, number: int, generation: Generation) -> bytes:
        params = self.requests[number].params
        found: dict[str, Any] = {"sample": number % self.num_samples} if self.num_samples > 1 else {}
        found |= {"text": generation.text, "finish_reason": generation.finish_reason}
        found |= {"prompt_tokens": len(self.requests[number].prompt), "new_tokens": len(generation.tokens)}
        if params.logprobs is not None:
            found["logprobs"] = [self._logprob(token) for token in generation.tokens]
        line = json.dumps({**self.records[number // self.num_samples], **found}, ensure_ascii=False)
        return line.encode("utf-8", errors="replace") + b"\n"

    def _logprob(self, token: Token) -> dict[str, Any]:
        top = [self._named(index, logprob) for index, logprob in token.top]
        assert token.logprob is not None
        return {**self._named(token.id, token.logprob), "top": top}

    def _named(self, index: int, logprob: float) -> dict[str, Any]:
        name = self.generator.tokenizer.decode([index], skip_special_tokens=False)
        return {"id": index, "token": name, "logprob": logprob}


def check_files(prompt: str | None, prompts: str | None, output: str | None, overwrite: bool) -> None:
    """Refuse what cannot be done, before anything is read.

    Raises:
        ValueError: no prompt, two kinds of them, or a folder; an output that is there, a folder or the file of prompts.
    """
    if (prompt is None) == (prompts is None):
        raise ValueError("prompt: give either --prompt TEXT or --prompts FILE")
    if prompts is not None and Path(prompts).is_dir():
        raise ValueError(f"prompts: {prompts} is a folder; name a file in it")
    if output is None:
        return
    path = Path(output)
    if prompts is not None and path.resolve() == Path(prompts).resolve():
        raise ValueError(f"output: {output} is the file of prompts")
    if path.is_dir():
        raise ValueError(f"output: {output} is a folder; name a file in it")
    if path.exists() and not overwrite:
        raise ValueError(f"output: {output} is already there: add --overwrite to replace it")


def open_output(path: str, overwrite: bool) -> BinaryIO:
    """A file for the lines; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return open(path, "wb" if overwrite else "xb", buffering=0)  # a line is one write


def _in_order(finished: Iterable[tuple[int, Generation]]) -> Iterator[Generation]:
    """Numbered things, each when those of smaller numbers are out."""
    waiting: dict[int, Generation] = {}
    following = 0
    for number, generation in finished:
        waiting[number] = generation
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _ids(generator: Generator, prompt: PromptRecord, params: SamplingParams, chat: bool, system: str | None) -> list[int]:
    """A prompt's ids.

    Raises:
        ValueError: it cannot be continued, or has keys that are written.
    """
    try:
        for key in WRITTEN:
            if key in prompt.record:
                raise ValueError(f"the answer is written with the key {key!r}: give the record's another name")
        if isinstance(prompt.content, str) and not chat:
            if system is not None:
                raise ValueError("a system prompt needs a chat: add --chat true, or write messages")
            return generator.check(prompt.content, params)
        messages = prompt.content
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return generator.check(generator.converse(messages, prompt.tools, system), params)
    except ValueError as error:
        raise ValueError(f"{prompt.place}: {error}") from None
