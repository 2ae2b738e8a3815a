"""Generator: continues texts with a model folder.

``generate`` and ``stream`` run an engine sized for their prompts; ``engine`` returns one that serves many calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch

from bumblebee.checkpoint.adapters.folder import check_generates
from bumblebee.distributed import process_group
from bumblebee.inference.engine import GenerationEngine
from bumblebee.inference.engine_config import EngineConfig
from bumblebee.inference.kv_cache import BLOCK_SIZE, num_blocks
from bumblebee.inference.placement.cpu_prepack import prepack
from bumblebee.inference.placement.device_map import available_devices, load_on_devices
from bumblebee.inference.placement.fused_linear import fuse_projections
from bumblebee.inference.placement.quantized_kernels import describe, use_fast_kernels
from bumblebee.inference.request import EngineRequest, FinishReason, RequestOutput, SampledToken
from bumblebee.inference.sampling.generation_config import default_sampling, read_generation_config, stop_ids_of
from bumblebee.inference.sampling.sampling_params import SamplingParams
from bumblebee.inference.sequence import blocks_needed, validate_prompt
from bumblebee.models.base import LanguageModel
from bumblebee.models.loading import load_model
from bumblebee.nn.batch_invariant import is_batch_invariant
from bumblebee.nn.quantized import Scheme
from bumblebee.tokenizer.assistant_mask import Message
from bumblebee.tokenizer.chat_template import Tool, with_system
from bumblebee.tokenizer.tokenizer import Tokenizer

Prompt = str | Sequence[int]  # a text, or token ids, such as those of ``encode_chat``


@dataclass
class Completion:
    """What was generated for one prompt.

    Args:
        text: without the prompt and without special tokens.
        tokens: new tokens, with log-probabilities if requested; a token that ended the sequence is the last of them.
        finish_reason: "stop" at an end-of-text token, a stop id or a stop string; "length" at max_new_tokens or the model's
            last position.
    """

    text: str
    tokens: list[SampledToken]
    finish_reason: FinishReason

    @property
    def token_ids(self) -> list[int]:
        """Ids of the new tokens."""
        return [token.id for token in self.tokens]

    def add(self, output: RequestOutput) -> None:
        """Append the output of one engine step."""
        self.text += output.text
        self.tokens += output.tokens
        self.finish_reason = output.finish_reason or self.finish_reason


class Generator:
    """A model with its tokenizer and generation defaults.

    Args:
        model: on its device; put into evaluation mode.
        tokenizer: of the model.
        stop_ids: token ids that end a sequence, in addition to those of the config and the tokenizer.
        defaults: how to sample when a call passes no params; None is greedy.
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
        quantize: Scheme | None = None,
    ) -> Generator:
        """Load a model folder with its tokenizer. Weights are prepacked and fused, so the model cannot be trained.

        Args:
            folder: model folder or adapter folder.
            device: auto, cpu, cuda or cuda:N.
            dtype: auto for the checkpoint's dtype, or float32, bfloat16, float16.
            device_map: auto spreads the layers over all GPUs if one of them is too small.
            trust_remote_code: run code that the folder names or contains.
            quantize: int8 or int4: quantize the linear layers while loading (docs/serving.md); None keeps the weights.

        Raises:
            ValueError: the folder has no model or tokenizer, the device or dtype is unknown, or the model does not fit.
        """
        if isinstance(dtype, str) and dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"unknown dtype {dtype!r}; write auto, float32, bfloat16 or float16")
        torch_dtype = dtype if isinstance(dtype, torch.dtype) else None if dtype == "auto" else getattr(torch, dtype)
        if quantize not in (None, "int8", "int4"):
            raise ValueError(f"quantize must be int8, int4 or null, got {quantize!r}")
        check_generates(folder)
        if device_map is None:
            model = load_model(folder, torch_dtype, process_group.pick_device(device), trust_remote_code, quantize)
            if not is_batch_invariant():
                prepack(model)
        else:
            model = load_on_devices(folder, *available_devices(device_map, device), torch_dtype, trust_remote_code, quantize)
        use_fast_kernels(model)
        if not is_batch_invariant():
            fuse_projections(model)
        tokenizer = Tokenizer.from_pretrained(folder)
        generation_config = read_generation_config(folder)
        return cls(model, tokenizer, stop_ids_of(generation_config), default_sampling(generation_config))

    @property
    def precision(self) -> str:
        """The dtype, and how the weights are quantized: "bfloat16", or "bfloat16, int8 weights"."""
        scheme = describe(self.model)
        return str(self.dtype).removeprefix("torch.") + (f", {scheme} weights" if scheme else "")

    def encode(self, prompt: Prompt) -> list[int]:
        """Encode a text, with the begin-of-text token if the tokenizer adds one; token ids are returned unchanged."""
        return self.tokenizer.prompt_ids(prompt) if isinstance(prompt, str) else list(prompt)

    def encode_chat(
        self,
        messages: str | Sequence[Message],
        tools: Sequence[Tool] | None = None,
        system: str | None = None,
    ) -> list[int]:
        """Apply the tokenizer's chat template, up to where the assistant's answer begins.

        Args:
            messages: the conversation so far; a string is a single user message.
            tools: tools that the answer may call.
            system: system prompt of a conversation that has none.

        Raises:
            ValueError: the template cannot be rendered.
        """
        conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self.tokenizer.chat_template.apply(with_system(conversation, system), tools, True)

    def prepare(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """Encode a prompt and check that the model can continue it with these parameters.

        Raises:
            ValueError: the prompt is empty or too long, or an id is out of the vocabulary.
        """
        ids = self.encode(prompt)
        validate_prompt(ids, self.model.config)
        params.check_ids(self.model.config.vocab_size)
        return ids

    def engine(self, config: EngineConfig | None = None, block_size: int = BLOCK_SIZE) -> GenerationEngine:
        """An engine for many requests, which keeps its KV cache between them."""
        return GenerationEngine(self.model, self.tokenizer, self.stop_ids, config, block_size)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Continue each prompt; the completions are in the order of the prompts.

        Args:
            prompts: texts or token ids.
            params: for all prompts, or one for each; None for ``defaults``.

        Raises:
            ValueError: a prompt cannot be continued, or the numbers of params and prompts differ.
        """
        return self.complete(self._requests(prompts, params))

    def complete(
        self,
        requests: Sequence[EngineRequest],
        progress: Callable[[int], object] = lambda count: None,
        engine: GenerationEngine | None = None,
    ) -> list[Completion]:
        """Run requests with different ids to their end; the completions are in the order of the requests.

        Args:
            requests: the requests.
            progress: called with the number of completions that have just been finished, like ``tqdm.update``.
            engine: that runs them, with what its KV cache holds; None for a new one.

        Raises:
            ValueError: a request can never run.
        """
        completions = {request.id: Completion("", [], "length") for request in requests}
        for output in self.outputs(requests, engine):
            completions[output.id].add(output)
            if output.finish_reason is not None:
                progress(1)
        return list(completions.values())

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Continue one prompt, yielding text as soon as it is complete. The pieces, joined, are the text of ``generate``.

        Closing the iterator early frees its KV cache.

        Raises:
            ValueError: the prompt cannot be continued; raised at the first piece.
        """
        yield from (output.text for output in self.outputs(self._requests([prompt], params)) if output.text)

    def outputs(self, requests: Sequence[EngineRequest], engine: GenerationEngine | None = None) -> Iterator[RequestOutput]:
        """Run requests to their end, yielding what each engine step produces.

        Only a part of them is in the engine at any time, since each takes memory there.

        Raises:
            ValueError: a request can never run.
        """
        engine, waiting = engine or self.engine_for(requests), iter(requests)
        for request in islice(waiting, 2 * engine.scheduler.max_running):
            engine.submit(request)
        while engine.busy:
            for output in engine.step():
                yield output
                if output.finish_reason is not None:
                    for request in islice(waiting, 1):
                        engine.submit(request)

    def _requests(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[EngineRequest]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or self.defaults] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"params has {len(params)} entries for {len(prompts)} prompts: give one for each, or one for all")
        requests = []
        for number, (prompt, prompt_params) in enumerate(zip(prompts, params, strict=True), start=1):
            try:
                requests.append(EngineRequest(str(number), self.prepare(prompt, prompt_params), prompt_params))
            except ValueError as error:
                place = f"prompt {number} of {len(prompts)}: " if len(prompts) > 1 else ""
                raise ValueError(f"{place}{error}") from None
        return requests

    def engine_for(self, requests: Sequence[EngineRequest]) -> GenerationEngine:
        """An engine whose KV cache is no larger than these requests can fill."""
        config, max_positions = EngineConfig(), self.model.config.max_position_embeddings
        needs = sorted((blocks_needed(request, max_positions, BLOCK_SIZE) for request in requests), reverse=True)
        blocks = min(sum(needs[: config.max_running]), num_blocks(self.model, config))
        return self.engine(EngineConfig(cache_tokens=BLOCK_SIZE * max(blocks, *needs[:1], 1)))
