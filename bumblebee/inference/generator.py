"""Generator: continues texts with a model folder.

``generate`` and ``stream`` each run an engine of their own, just large enough; ``engine`` gives one that stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from bumblebee.distributed import process_group
from bumblebee.inference.cpu_prepack import pack
from bumblebee.inference.device_map import devices_for, spread
from bumblebee.inference.engine import GenerationEngine, GenerationOptions
from bumblebee.inference.generation_config import read_settings, sampling_of, stop_ids_of
from bumblebee.inference.kv_cache_size import PAGE_SIZE, pages_for
from bumblebee.inference.request import FinishReason, Output, Request, Token
from bumblebee.inference.sampling_params import SamplingParams
from bumblebee.inference.sequence import check_prompt, pages_needed
from bumblebee.models.base import LanguageModel
from bumblebee.models.loading import load_model
from bumblebee.tokenizer.chat_template import with_system
from bumblebee.tokenizer.tokenizer import Tokenizer

Prompt = str | Sequence[int]  # a text, or the ids of one: a chat's, for instance, that its template has made


@dataclass
class Generation:
    """What was generated for one prompt.

    Args:
        text: without the prompt and without special tokens.
        tokens: the new tokens, with log-probabilities where they were asked for; one that ended them is the last.
        finish_reason: "stop" at an end-of-text token, a stop id or a stop string; "length" at max_new_tokens or the model's
            last position.
    """

    text: str
    tokens: list[Token]
    finish_reason: FinishReason

    @property
    def token_ids(self) -> list[int]:
        """The new tokens' ids."""
        return [token.id for token in self.tokens]

    def add(self, output: Output) -> None:
        """What one more step brought."""
        self.text += output.text
        self.tokens += output.tokens
        self.finish_reason = output.finish_reason or self.finish_reason


class Generator:
    """Continues texts.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: the model's.
        stop_ids: ids that end a text, beside the config's and the tokenizer's.
        defaults: how to choose tokens where a call does not say; None takes the most likely ones.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        stop_ids: Sequence[int] = (),
        defaults: SamplingParams | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.stop_ids = frozenset([*stop_ids, *model.config.eos_token_ids, *eos])
        self.defaults = defaults or SamplingParams(temperature=0.0)
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        device_map: Literal["auto"] | None = None,
        trust_remote_code: bool = False,
    ) -> Generator:
        """Read a model folder with its tokenizer. On a CPU the weights are packed: the model generates, it does not train.

        Args:
            folder: the model folder.
            device: auto, cpu, cuda or cuda:N.
            dtype: auto for the file's, or float32, bfloat16, float16.
            device_map: auto spreads the layers over the GPUs there are, if one of them is too small.
            trust_remote_code: run code that the folder names or holds.

        Raises:
            ValueError: no model or tokenizer there, an unknown device or dtype, or a model too large for all devices.
        """
        if isinstance(dtype, str) and dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"unknown dtype {dtype!r}; write auto, float32, bfloat16 or float16")
        chosen = dtype if isinstance(dtype, torch.dtype) else None if dtype == "auto" else getattr(torch, dtype)
        if device_map is None:
            model = load_model(folder, chosen, process_group.pick_device(device), trust_remote_code)
            pack(model)
        else:
            model = spread(folder, *devices_for(device_map, device), chosen, trust_remote_code)
        tokenizer = Tokenizer.from_pretrained(folder)
        settings = read_settings(folder)
        return cls(model, tokenizer, stop_ids_of(settings), sampling_of(settings))

    def encode(self, prompt: Prompt) -> list[int]:
        """A text's ids, after the begin-of-text token where the tokenizer puts one; ids as they are."""
        return self.tokenizer.prompt_ids(prompt) if isinstance(prompt, str) else list(prompt)

    def ask(self, question: str, system: str | None = None) -> list[int]:
        """A question as a prompt: the ids that the tokenizer's chat template makes of it, up to where the answer begins.

        Raises:
            ValueError: the template cannot be rendered.
        """
        return self.converse([{"role": "user", "content": question}], None, system)

    def converse(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        system: str | None = None,
    ) -> list[int]:
        """A conversation as a prompt, up to where the answer begins.

        Args:
            messages: of the conversation so far.
            tools: that the answer may call.
            system: the system prompt, if the conversation brings none.

        Raises:
            ValueError: the template cannot be rendered.
        """
        return self.tokenizer.chat_template.apply(with_system(messages, system), tools, True)

    def check(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """The prompt's ids, if they can be continued.

        Raises:
            ValueError: an empty prompt, one that leaves no position for a new token, or ids that the model does not have.
        """
        ids = self.encode(prompt)
        check_prompt(ids, self.model.config)
        params.check_ids(self.model.config.vocab_size)
        return ids

    def engine(self, options: GenerationOptions | None = None) -> GenerationEngine:
        """An engine for many requests, which keeps its cache."""
        return GenerationEngine(self.model, self.tokenizer, self.stop_ids, options)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Generation]:
        """Continue each prompt; the results are in the prompts' order.

        Args:
            prompts: texts or ids.
            params: of all prompts, or of each; None for ``defaults``.

        Raises:
            ValueError: a prompt that cannot be continued; not as many params as prompts.
        """
        requests = self._requests(prompts, params)
        found = {request.id: Generation("", [], "length") for request in requests}
        for output in self.outputs(requests):
            found[output.id].add(output)
        return list(found.values())

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Continue one prompt, giving out text as soon as it is complete. Joined, the pieces are ``generate``'s text.

        Whoever leaves the iterator early frees all that it holds.

        Raises:
            ValueError: a prompt that cannot be continued; at the first piece.
        """
        yield from (output.text for output in self.outputs(self._requests([prompt], params)) if output.text)

    def outputs(self, requests: Sequence[Request]) -> Iterator[Output]:
        """Compute requests; what each step brings each of them.

        However many they are, only some are in the engine at a time, since each takes memory there.

        Raises:
            ValueError: a request that can never run.
        """
        engine, waiting = self._engine_for(requests), iter(requests)
        for request in islice(waiting, 2 * engine.scheduler.max_running):
            engine.submit(request)
        while engine.busy:
            for output in engine.step():
                yield output
                if output.finish_reason is not None:
                    for request in islice(waiting, 1):
                        engine.submit(request)

    def _requests(self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None) -> list[Request]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or self.defaults] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"params has {len(params)} entries for {len(prompts)} prompts: give one for each, or one for all")
        many = len(prompts) > 1
        requests = []
        for number, (prompt, chosen) in enumerate(zip(prompts, params, strict=True), start=1):
            try:
                requests.append(Request(str(number), self.check(prompt, chosen), chosen))
            except ValueError as error:
                raise ValueError(f"prompt {number} of {len(prompts)}: {error}" if many else str(error)) from None
        return requests

    def _engine_for(self, requests: Sequence[Request]) -> GenerationEngine:
        """An engine for these requests, with no larger a cache than they can fill."""
        options, longest = GenerationOptions(), self.model.config.max_position_embeddings
        needs = sorted((pages_needed(request, longest, PAGE_SIZE) for request in requests), reverse=True)
        wanted = min(sum(needs[: options.max_running]), pages_for(self.model, options))
        return self.engine(GenerationOptions(cache_tokens=PAGE_SIZE * max(wanted, *needs[:1], 1)))
