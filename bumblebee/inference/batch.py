"""BatchGeneration: completions of many prompts as JSON Lines, one object per completion.

    {... the prompt's record ..., "text": ..., "finish_reason": ..., "prompt_tokens": 5, "new_tokens": 64}

Several samples per prompt are numbered by "sample", from 0; requested log-probabilities are in "logprobs". All prompts are
checked before the first is computed. Each line is a single write, in the order of the prompts, so an interrupted run leaves the
completions of the first prompts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

from tqdm import tqdm

from bumblebee.inference.generator import Completion, Generator
from bumblebee.inference.request import EngineRequest, SampledToken
from bumblebee.inference.sampling.sampling_params import SamplingParams
from bumblebee.utils.formatting import short

OUTPUT_KEYS = ("sample", "text", "finish_reason", "prompt_tokens", "new_tokens", "logprobs")
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} texts [{elapsed}, {remaining} left{postfix}]"

Json = dict[str, Any]  # a JSON object


@dataclass(frozen=True)
class PromptRecord:
    """A prompt and the record that it comes from; ``datamodules.prompt_files`` reads them from files.

    Args:
        place: file and line, for error messages.
        record: all keys of the record.
        content: a text, or the messages of a chat that ends with a user message.
        tools: tools that the answer may call, as the chat template takes them.
    """

    place: str
    record: Json
    content: str | list[Json]
    tools: list[Json] | None = None

    @classmethod
    def of(cls, text: str) -> PromptRecord:
        """The record of a ``--prompt``."""
        return cls("prompt", {"prompt": text}, text)


class BatchGeneration:
    """Completions of a list of prompts.

    Args:
        generator: the model.
        prompts: at least one.
        params: how to sample. With a seed, sample n of each prompt has the seed ``seed + n``.
        num_samples: completions per prompt.
        chat: apply the chat template to texts, as user messages; messages always use it.
        system: system prompt of chats that have none.

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
        self.records: list[Json] = []
        self.requests: list[EngineRequest] = []
        for prompt in prompts:
            token_ids = _encode(generator, prompt, params, chat, system)
            is_chat = chat or not isinstance(prompt.content, str)
            prompt_params = params.ending_with(generator.tokenizer.end_of_turn_ids) if is_chat else params
            self.records.append(prompt.record)
            for seed in seeds:
                self.requests.append(EngineRequest(str(len(self.requests)), token_ids, replace(prompt_params, seed=seed)))
        if not self.records:
            raise ValueError("prompts: the file has none")

    def write(self, file: BinaryIO) -> None:
        """Generate all completions and write each line as soon as those before it are written."""
        with tqdm(total=len(self.requests), bar_format=BAR, disable=None, leave=False) as bar:
            for number, completion in enumerate(_in_order(self._completions(bar))):
                file.write(self._line(number, completion))
                file.flush()

    def print(self, prefix: str, stream: bool = True) -> None:
        """Print the only completion after a prefix, piece by piece or at once."""
        [request] = self.requests
        pieces = (output.text for output in self.generator.outputs([request]))
        print(prefix, end="", flush=True)
        for piece in pieces if stream else ["".join(pieces)]:
            print(piece, end="", flush=True)
        print()

    def _completions(self, bar: tqdm) -> Iterator[tuple[int, Completion]]:
        """Finished completions with their request numbers, as they finish."""
        unfinished: dict[str, Completion] = {}
        tokens, started = 0, monotonic()
        for output in self.generator.outputs(self.requests):
            completion = unfinished.setdefault(output.id, Completion("", [], "length"))
            completion.add(output)
            tokens += len(output.tokens)
            if not bar.disable:
                bar.set_postfix_str(f"{short(tokens / max(monotonic() - started, 1e-9))} tokens/s", refresh=False)
            if output.finish_reason is not None:
                bar.update()
                yield int(output.id), unfinished.pop(output.id)

    def _line(self, number: int, completion: Completion) -> bytes:
        request = self.requests[number]
        fields: Json = {"sample": number % self.num_samples} if self.num_samples > 1 else {}
        fields |= {"text": completion.text, "finish_reason": completion.finish_reason}
        fields |= {"prompt_tokens": len(request.prompt), "new_tokens": len(completion.tokens)}
        if request.params.logprobs is not None:
            fields["logprobs"] = [self._logprob(token) for token in completion.tokens]
        line = json.dumps({**self.records[number // self.num_samples], **fields}, ensure_ascii=False)
        return line.encode("utf-8", errors="replace") + b"\n"

    def _logprob(self, token: SampledToken) -> Json:
        assert token.logprob is not None
        top = [self._named(token_id, logprob) for token_id, logprob in token.top]
        return {**self._named(token.id, token.logprob), "top": top}

    def _named(self, token_id: int, logprob: float) -> Json:
        text = self.generator.tokenizer.decode([token_id], skip_special_tokens=False)
        return {"id": token_id, "token": text, "logprob": logprob}


def check_files(prompt: str | None, prompts: str | None, output: str | None, overwrite: bool) -> None:
    """Check the prompt and output options before anything is read.

    Raises:
        ValueError: neither or both of ``prompt`` and ``prompts``; a path that is a folder; an output that exists without
            ``overwrite``, or that is the prompts file.
    """
    if (prompt is None) == (prompts is None):
        raise ValueError("prompt: give either --prompt TEXT or --prompts FILE")
    if prompts is not None and Path(prompts).is_dir():
        raise ValueError(f"prompts: {prompts} is a folder; name a file in it")
    if output is None:
        return
    path = Path(output)
    if prompts is not None and path.resolve() == Path(prompts).resolve():
        raise ValueError(f"output: {output} is the prompts file")
    if path.is_dir():
        raise ValueError(f"output: {output} is a folder; name a file in it")
    if path.exists() and not overwrite:
        raise ValueError(f"output: {output} already exists: add --overwrite to replace it")


def open_output(path: str, overwrite: bool) -> BinaryIO:
    """Open the output file, creating its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return open(path, "wb" if overwrite else "xb", buffering=0)  # unbuffered: one write per line


def _in_order(completions: Iterable[tuple[int, Completion]]) -> Iterator[Completion]:
    """Completions in the order of their numbers, each as soon as all before it have been yielded."""
    waiting: dict[int, Completion] = {}
    following = 0
    for number, completion in completions:
        waiting[number] = completion
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _encode(generator: Generator, prompt: PromptRecord, params: SamplingParams, chat: bool, system: str | None) -> list[int]:
    """Token ids of a prompt.

    Raises:
        ValueError: the prompt cannot be continued, or its record has a key that the output uses.
    """
    try:
        for key in OUTPUT_KEYS:
            if key in prompt.record:
                raise ValueError(f"the output uses the key {key!r}: rename the record's key")
        if isinstance(prompt.content, str) and not chat:
            if system is not None:
                raise ValueError("a system prompt needs a chat: add --chat true, or write messages")
            return generator.prepare(prompt.content, params)
        return generator.prepare(generator.encode_chat(prompt.content, prompt.tools, system), params)
    except ValueError as error:
        raise ValueError(f"{prompt.place}: {error}") from None
