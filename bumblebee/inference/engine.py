"""GenerationEngine: many requests at once, one forward pass a step.

    submit(request) ... -> [ step() -> outputs ] while busy

A step drops what was cancelled or is late, lets the scheduler choose tokens, the runner compute them and the sampler choose
what follows. The engine belongs to one thread.

When a step raises, nothing has advanced: no page that it wrote is remembered, so the pool is as sound as before. Step again to
compute the same anew, or ``reset`` to drop all requests and everything that is cached.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

from bumblebee.inference.block_pool import Pages
from bumblebee.inference.detokenizer import Detokenizer
from bumblebee.inference.engine_config import EngineStats, GenerationOptions
from bumblebee.inference.kv_cache_size import PAGE_SIZE, pages_for
from bumblebee.inference.model_runner import Runner
from bumblebee.inference.request import FinishReason, Output, Request, Token
from bumblebee.inference.sampler import SamplerState, sample
from bumblebee.inference.scheduler import Scheduler
from bumblebee.inference.sequence import Sequence, check_prompt
from bumblebee.models.base import LanguageModel
from bumblebee.tokenizer.tokenizer import Tokenizer

__all__ = ["EngineStats", "GenerationEngine", "GenerationOptions"]


class _Growing:
    """What grows of one request: its tokens, the choice of the next, and the text of the new ones."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer) -> None:
        request = sequence.request
        self.sequence = sequence
        self.sampler = SamplerState(request.prompt, request.params)
        self.detokenizer = Detokenizer(tokenizer, request.params.stop, request.params.spelled_ids)


class GenerationEngine:
    """Generates for many requests at once.

    Args:
        model: on its device; it is put into evaluation mode.
        tokenizer: the model's.
        stop_ids: ids that end a text, unless a request ignores them.
        options: limits.

    Raises:
        ValueError: an option that cannot be.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        stop_ids: Collection[int] = (),
        options: GenerationOptions | None = None,
    ) -> None:
        options = options or GenerationOptions()
        self.tokenizer, self.stop_ids = tokenizer, frozenset(stop_ids)
        self.config = model.config
        self.pages = Pages(pages_for(model, options), PAGE_SIZE, options.prefix_reuse)
        self.scheduler = Scheduler(self.pages, options.max_running, options.step_tokens)
        self.runner = Runner(model.eval(), self.pages.total, PAGE_SIZE)
        self._growing: dict[str, _Growing] = {}
        self._cancelled: set[str] = set()
        self._outputs: list[Output] = []  # of the step that is being computed
        self._counts = dict.fromkeys(("prompt_tokens", "cached_tokens", "new_tokens", "steps"), 0)

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._growing)

    def submit(self, request: Request) -> None:
        """Put a request into the queue.

        Raises:
            ValueError: it can never run, or one of the same id is there.
        """
        sequence = self.check(request)
        if request.id in self._growing:
            raise ValueError(f"a request with the id {request.id!r} is there already")
        self._growing[request.id] = _Growing(sequence, self.tokenizer)
        self.scheduler.waiting.append(sequence)

    def check(self, request: Request) -> Sequence:
        """The request's sequence.

        Raises:
            ValueError: an empty prompt, ids that the model does not have, a prompt that leaves no position for a new token, or
                more positions needed than the cache has.
        """
        check_prompt(request.prompt, self.config)
        request.params.check_ids(self.config.vocab_size)
        sequence = Sequence(request, self.config.max_position_embeddings, self.pages.size)
        if sequence.pages_needed > self.pages.total:
            new = sequence.limit - sequence.prompt_tokens
            raise ValueError(
                f"the prompt's {sequence.prompt_tokens} tokens and {new} new ones need"
                f" {sequence.pages_needed * self.pages.size} positions of the key-value cache, which has"
                f" {self.pages.total * self.pages.size}: set a smaller max_new_tokens or a larger cache_tokens"
            )
        return sequence

    def cancel(self, id: str) -> None:
        """End a request in the next step, whose output for it says "cancelled"; unknown ids are ignored."""
        if id in self._growing:
            self._cancelled.add(id)

    def reset(self) -> None:
        """Drop all requests without any output, and everything that is cached."""
        for id in list(self._growing):
            self._drop(id)
        self._cancelled.clear()
        self._outputs.clear()
        self.pages.forget()

    def step(self) -> list[Output]:
        """One forward pass: what it brought each request that got a token or ended; [] when there is nothing to do."""
        self._end_those(self._cancelled, "cancelled")
        self._end_those(self._late(), "timeout")
        if chunks := sorted(self.scheduler.plan(), key=lambda chunk: chunk.count > 1):
            growing = [self._growing[chunk.sequence.request.id] for chunk in chunks if chunk.is_last]
            logits = self.runner.run(chunks)
            tokens = sample(logits, [each.sampler for each in growing]) if growing else []
            self._counts["steps"] += 1
            for chunk in chunks:
                self.scheduler.advance(chunk)
            for each, token in zip(growing, tokens, strict=True):
                self._grow(each, token)
        outputs, self._outputs = self._outputs, []
        return outputs

    def stats(self) -> EngineStats:
        """Where it stands."""
        pages = self.pages
        queue = (len(self.scheduler.running), len(self.scheduler.waiting))
        return EngineStats(*queue, pages.total, pages.free, pages.cached, **self._counts)

    def _grow(self, growing: _Growing, token: Token) -> None:
        """A new token: its text, and whether it is the last."""
        sequence, params = growing.sequence, growing.sequence.request.params
        if len(sequence.tokens) == sequence.prompt_tokens:
            self._counts["prompt_tokens"] += sequence.prompt_tokens
            self._counts["cached_tokens"] += sequence.cached_tokens
        self._counts["new_tokens"] += 1
        sequence.tokens.append(token.id)
        ends = token.id in params.stop_ids or (token.id in self.stop_ids and not params.ignore_eos)
        text = "" if ends else growing.detokenizer.add(token.id)
        if ends or growing.detokenizer.stopped:
            self._end(growing, [token], text, "stop")
        elif len(sequence.tokens) == sequence.limit:
            self._end(growing, [token], text, "length")
        else:
            self._outputs.append(self._output(sequence, text, [token], None))

    def _late(self) -> list[str]:
        now = time.monotonic()
        deadlines = ((id, each.sequence.request.deadline) for id, each in self._growing.items())
        return [id for id, deadline in deadlines if deadline is not None and deadline <= now]

    def _end_those(self, ids: Iterable[str], reason: FinishReason) -> None:
        for id in list(ids):
            self._end(self._growing[id], [], "", reason)

    def _end(self, growing: _Growing, tokens: list[Token], text: str, reason: FinishReason) -> None:
        """The request's last output; its pages are given back."""
        text += growing.detokenizer.finish()
        self._outputs.append(self._output(growing.sequence, text, tokens, reason))
        self._drop(growing.sequence.request.id)

    def _drop(self, id: str) -> None:
        self.scheduler.remove(self._growing.pop(id).sequence)
        self._cancelled.discard(id)

    def _output(self, sequence: Sequence, text: str, tokens: list[Token], reason: FinishReason | None) -> Output:
        return Output(sequence.request.id, text, tokens, reason, sequence.prompt_tokens, sequence.cached_tokens)
