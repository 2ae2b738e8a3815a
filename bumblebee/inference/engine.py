"""GenerationEngine: continuous batching, one forward pass per step.

    submit(request) ... -> [ step() -> outputs ] while busy

A step drops cancelled and expired requests, lets the scheduler choose tokens, the model runner compute them and the sampler
choose the next ones. On a GPU the text of a step's tokens is made while the GPU computes the next step, and is part of that
step's outputs; requests with stop strings, whose text decides whether they go on, have theirs at once. Not thread-safe.

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
        self.defers_text = self.model_runner.kv_cache.device.type == "cuda"
        self._without_text: list[tuple[_RequestState, SampledToken, FinishReason | None]] = []  # tokens of the step before
        self._counts = dict.fromkeys(("prompt_tokens", "cached_tokens", "new_tokens", "steps"), 0)

    @property
    def busy(self) -> bool:
        """Whether there are unfinished requests, or outputs that the next step returns."""
        return bool(self._states or self._without_text)

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
        for pending in (self._cancelled, self._outputs, self._without_text):
            pending.clear()
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
        else:
            self._make_text()
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
        self._make_text()  # of the step before, while the GPU computes
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
        """Append a sampled token to its sequence, and release its blocks if it is the last. Its text may follow later."""
        sequence, params = state.sequence, state.sequence.request.params
        self._counts["new_tokens"] += 1
        sequence.token_ids.append(token.id)
        reason: FinishReason | None = "length" if len(sequence.token_ids) == sequence.max_length else None
        if token.id in state.stop_ids:
            reason = "stop"
        if self.defers_text and not params.stop:
            if reason is not None:
                self._drop(sequence.request.id)
            self._without_text.append((state, token, reason))
        else:
            self._emit(state, token, reason)

    def _make_text(self) -> None:
        """Output the tokens whose text has been deferred."""
        pending, self._without_text = self._without_text, []
        for state, token, reason in pending:
            self._emit(state, token, reason)

    def _emit(self, state: _RequestState, token: SampledToken, reason: FinishReason | None) -> None:
        """Output a token with its text, and finish the request if it is the last or completes a stop string."""
        is_silent = token.id in state.stop_ids and not state.sequence.request.params.include_stop_str_in_output
        text = "" if is_silent else state.detokenizer.add(token.id)
        if state.detokenizer.stopped:
            reason = "stop"
        if reason is None:
            self._outputs.append(state.output(text, [token], None))
        else:
            self._finish(state, [token], text, reason)

    def _expired(self) -> list[str]:
        now = time.monotonic()
        deadlines = ((id, state.sequence.request.deadline) for id, state in self._states.items())
        return [id for id, deadline in deadlines if deadline is not None and deadline <= now]

    def _finish_all(self, ids: Iterable[str], reason: FinishReason) -> None:
        if ending := list(ids):
            self._make_text()  # precedes their last outputs
        for id in ending:
            self._finish(self._states[id], [], "", reason)

    def _finish(self, state: _RequestState, tokens: list[SampledToken], text: str, reason: FinishReason) -> None:
        """Emit the request's last output and release its blocks."""
        text += state.detokenizer.finish()
        self._outputs.append(state.output(text, tokens, reason))
        if self._states.get(state.sequence.request.id) is state:
            self._drop(state.sequence.request.id)

    def _drop(self, id: str) -> None:
        self.scheduler.remove(self._states.pop(id).sequence)
        self._cancelled.discard(id)
