"""GenerationEngine: continuous batching, one forward pass per step.

    submit(request) ... -> [ step() -> outputs ] while busy

A step drops cancelled and expired requests, lets the scheduler choose tokens, the model runner compute them and the sampler
choose the next ones. The engine is not thread-safe.

If a step raises, no sequence has advanced and no block that it wrote is registered, so the block pool stays consistent. Step
again to retry, or ``reset`` to drop all requests and the cached blocks.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

from bumblebee.inference.block_pool import BlockPool
from bumblebee.inference.detokenizer import Detokenizer
from bumblebee.inference.engine_config import EngineConfig, EngineStats
from bumblebee.inference.kv_cache import BLOCK_SIZE, num_blocks
from bumblebee.inference.model_runner import ModelRunner
from bumblebee.inference.request import EngineRequest, FinishReason, PromptToken, RequestOutput, SampledToken
from bumblebee.inference.sampling.logprobs import PromptScores
from bumblebee.inference.sampling.sampler import SamplerState, Sampling
from bumblebee.inference.scheduler import Scheduler
from bumblebee.inference.sequence import ScheduledChunk, Sequence, validate_prompt
from bumblebee.inference.transfers import read_back
from bumblebee.models.base import LanguageModel
from bumblebee.tokenizer.tokenizer import Tokenizer


class _RequestState:
    """A request in the engine: its sequence, stop ids, sampler state, detokenizer and, if requested, scored prompt tokens."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer, eos_ids: Collection[int]) -> None:
        request, params = sequence.request, sequence.request.params
        self.sequence = sequence
        self.stop_ids = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else frozenset(eos_ids))
        self.sampler = SamplerState(request.prompt, params, self.stop_ids)
        self.detokenizer = Detokenizer(
            tokenizer, params.stop, params.spelled_ids, params.min_new_tokens, params.include_stop_str_in_output
        )
        self.prompt_logprobs = [PromptToken(request.prompt[0])] if request.prompt_logprobs is not None else []

    def output(self, text: str, tokens: list[SampledToken], reason: FinishReason | None) -> RequestOutput:
        """The request's output of a step, the first time after the prompt with the scored prompt tokens."""
        sequence, scored = self.sequence, None
        if self.prompt_logprobs and sequence.num_computed >= sequence.num_prompt_tokens:
            scored, self.prompt_logprobs = self.prompt_logprobs, []
        id, prompt_tokens, cached_tokens = sequence.request.id, sequence.num_prompt_tokens, sequence.num_cached
        return RequestOutput(id, text, tokens, reason, prompt_tokens, cached_tokens, scored)


class GenerationEngine:
    """Generates for many requests at once.

    Args:
        model: on its device; put into evaluation mode.
        tokenizer: of the model.
        stop_ids: token ids that end a sequence, unless a request ignores them.
        config: limits.
        block_size: positions per block. Prefixes are shared in whole blocks: small ones share more.

    Raises:
        ValueError: the KV cache does not fit in memory.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        stop_ids: Collection[int] = (),
        config: EngineConfig | None = None,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        config = config or EngineConfig()
        self.tokenizer, self.stop_ids = tokenizer, frozenset(stop_ids)
        self.model_config = model.config
        blocks = -(-num_blocks(model, config) * BLOCK_SIZE // block_size)
        self.block_pool = BlockPool(blocks, block_size, config.prefix_reuse)
        self.scheduler = Scheduler(self.block_pool, config.max_running, config.step_tokens)
        running = self.scheduler.max_running
        self.model_runner = ModelRunner(model.eval(), blocks, block_size, running, config.cuda_graphs)
        self._states: dict[str, _RequestState] = {}
        self._cancelled: set[str] = set()
        self._outputs: list[RequestOutput] = []  # of the step being computed
        self._counts = dict.fromkeys(("prompt_tokens", "cached_tokens", "new_tokens", "steps"), 0)

    @property
    def busy(self) -> bool:
        """Whether there are unfinished requests."""
        return bool(self._states)

    @property
    def cache_tokens(self) -> int:
        """Positions of the KV cache."""
        return self.block_pool.num_blocks * self.block_pool.block_size

    def submit(self, request: EngineRequest) -> None:
        """Add a request to the waiting queue.

        Raises:
            ValueError: the request can never run, or its id is in use.
        """
        sequence = self.validate(request)
        if request.id in self._states:
            raise ValueError(f"duplicate request id {request.id!r}")
        self._states[request.id] = _RequestState(sequence, self.tokenizer, self.stop_ids)
        self.scheduler.waiting.append(sequence)

    def validate(self, request: EngineRequest) -> Sequence:
        """Return the request's sequence.

        Raises:
            ValueError: the prompt is empty or too long, an id is out of the vocabulary, or the request needs more positions
                than the KV cache has.
        """
        validate_prompt(request.prompt, self.model_config, request.prompt_only)
        request.params.check_ids(self.model_config.vocab_size)
        sequence = Sequence(request, self.model_config.max_position_embeddings, self.block_pool.block_size)
        if sequence.blocks_needed > self.block_pool.num_blocks:
            new = sequence.max_length - sequence.num_prompt_tokens
            raise ValueError(
                f"the prompt's {sequence.num_prompt_tokens} tokens and {new} new ones need"
                f" {sequence.blocks_needed * self.block_pool.block_size} positions of the KV cache, which has"
                f" {self.cache_tokens}: set a smaller max_new_tokens or a larger cache_tokens"
            )
        return sequence

    def cancel(self, id: str) -> None:
        """End a request at the next step, with finish reason "cancelled"; unknown ids are ignored."""
        if id in self._states:
            self._cancelled.add(id)

    def reset(self) -> None:
        """Drop all requests without output, and all cached blocks."""
        for id in list(self._states):
            self._drop(id)
        self._cancelled.clear()
        self._outputs.clear()
        self.block_pool.reset()

    def step(self) -> list[RequestOutput]:
        """Run one forward pass; returns the outputs of all requests that got a token or ended, [] if there is nothing to do."""
        self._finish_all(self._cancelled, "cancelled")
        self._finish_all(self._expired(), "timeout")
        if chunks := sorted(self.scheduler.schedule(), key=lambda chunk: chunk.num_tokens > 1):
            scored, sampled = self._compute(chunks)
            self._advance(chunks, scored)
            for state, token in sampled:
                self._append(state, token)
        outputs, self._outputs = self._outputs, []
        return outputs

    def stats(self) -> EngineStats:
        """Current queue lengths, cache usage and totals."""
        pool = self.block_pool
        queue = (len(self.scheduler.running), len(self.scheduler.waiting))
        return EngineStats(*queue, pool.num_blocks, pool.num_free, pool.num_cached, **self._counts)

    def _state(self, chunk: ScheduledChunk) -> _RequestState:
        return self._states[chunk.sequence.request.id]

    def _compute(
        self, chunks: list[ScheduledChunk]
    ) -> tuple[list[tuple[_RequestState, PromptToken]], list[tuple[_RequestState, SampledToken]]]:
        """The scored prompt tokens of the chunks, in their order, and the next tokens, after a single wait for the GPU."""
        logits, prompt_logits = self.model_runner.run(chunks)
        owners = [(self._state(chunk), id) for chunk in chunks for id in chunk.scored]
        counts = [state.sequence.request.prompt_logprobs or 0 for state, _ in owners]
        scores = PromptScores(prompt_logits, [id for _, id in owners], counts)
        states = [self._state(chunk) for chunk in chunks if chunk.samples]
        sampling = Sampling(logits, [state.sampler for state in states]) if states else None
        scored, sampled = read_back(scores.tensors, sampling.tensors if sampling else ())
        prompt_tokens, tokens = scores.tokens(scored), sampling.tokens(sampled) if sampling else []
        return (
            [(state, token) for (state, _), token in zip(owners, prompt_tokens, strict=True)],
            list(zip(states, tokens, strict=True)),
        )

    def _advance(self, chunks: Iterable[ScheduledChunk], scored: Iterable[tuple[_RequestState, PromptToken]]) -> None:
        """Account for a computed step, and end the prompts that it has completed."""
        self._counts["steps"] += 1
        for state, token in scored:
            state.prompt_logprobs.append(token)
        for chunk in chunks:
            is_last = chunk.is_last
            self.scheduler.advance(chunk)
            if is_last:
                self._end_prompt(self._state(chunk))

    def _end_prompt(self, state: _RequestState) -> None:
        """Count a prompt that has just been computed, and finish a request that ends after it."""
        sequence = state.sequence
        if len(sequence.token_ids) > sequence.num_prompt_tokens:
            return
        self._counts["prompt_tokens"] += sequence.num_prompt_tokens
        self._counts["cached_tokens"] += sequence.num_cached
        if sequence.request.prompt_only:
            self._finish(state, [], "", "length")

    def _append(self, state: _RequestState, token: SampledToken) -> None:
        """Append a sampled token to its sequence and finish the request if it is the last."""
        sequence, params = state.sequence, state.sequence.request.params
        self._counts["new_tokens"] += 1
        sequence.token_ids.append(token.id)
        is_stop = token.id in state.stop_ids
        text = "" if is_stop and not params.include_stop_str_in_output else state.detokenizer.add(token.id)
        if is_stop or state.detokenizer.stopped:
            self._finish(state, [token], text, "stop")
        elif len(sequence.token_ids) == sequence.max_length:
            self._finish(state, [token], text, "length")
        else:
            self._outputs.append(state.output(text, [token], None))

    def _expired(self) -> list[str]:
        now = time.monotonic()
        deadlines = ((id, state.sequence.request.deadline) for id, state in self._states.items())
        return [id for id, deadline in deadlines if deadline is not None and deadline <= now]

    def _finish_all(self, ids: Iterable[str], reason: FinishReason) -> None:
        for id in list(ids):
            self._finish(self._states[id], [], "", reason)

    def _finish(self, state: _RequestState, tokens: list[SampledToken], text: str, reason: FinishReason) -> None:
        """Emit the request's last output and release its blocks."""
        text += state.detokenizer.finish()
        self._outputs.append(state.output(text, tokens, reason))
        self._drop(state.sequence.request.id)

    def _drop(self, id: str) -> None:
        self.scheduler.remove(self._states.pop(id).sequence)
        self._cancelled.discard(id)
