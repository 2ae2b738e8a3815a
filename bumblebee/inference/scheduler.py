"""First-come-first-served scheduler with continuous batching, chunked prefill and prefix caching.

A request is admitted when every block that it can ever need is available, so none is preempted for lack of memory. The head of
the queue is never overtaken. Each step decodes one token of every running sequence and spends the rest of its token budget on
prefill, oldest sequence first. At most as many sequences run as a step has tokens, so the oldest prefill always makes progress.

Prompts with a common prefix are computed once: while an older sequence computes a block that a younger one needs next, the
younger one waits and then reuses it. The older sequence is part of the same step, so there is no deadlock; if it is cancelled,
the younger one computes the block itself.

The cache holds no logits: a request that scores tokens reads no cached block and waits for none where it needs them, which for
the log-probabilities of a prompt is everywhere, but others may reuse what it computes.
"""

from __future__ import annotations

from collections import deque

from bumblebee.inference.block_pool import BlockKey, BlockPool
from bumblebee.inference.sequence import ScheduledChunk, Sequence

MAX_SCORED = 512  # tokens of a sequence that a step scores: their logits take memory, V numbers each


class Scheduler:
    """Waiting queue and running sequences.

    Args:
        block_pool: blocks of the KV cache.
        max_running: sequences that run at the same time.
        step_tokens: tokens per step.
    """

    def __init__(self, block_pool: BlockPool, max_running: int, step_tokens: int) -> None:
        self.block_pool, self.max_running, self.step_tokens = block_pool, min(max_running, step_tokens), step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of admission

    def schedule(self) -> list[ScheduledChunk]:
        """Admit sequences and return the next step's chunks, decode before prefill. Advances no sequence."""
        while self.waiting and len(self.running) < self.max_running and self._admit(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        chunks = [ScheduledChunk(sequence, 1) for sequence in self.running if sequence.num_remaining == 1]
        return chunks + self._schedule_prefill(self.step_tokens - len(chunks))

    def advance(self, chunk: ScheduledChunk) -> None:
        """Account for a computed chunk and register the blocks that it filled."""
        sequence, size = chunk.sequence, self.block_pool.block_size
        sequence.num_computed += chunk.num_tokens
        while (end := sequence.num_registered + size) <= sequence.num_computed:
            key = (sequence.content_id, tuple(sequence.token_ids[sequence.num_registered : end]))
            sequence.content_id = self.block_pool.register(sequence.block_table[sequence.num_registered // size], key)
            sequence.num_registered = end

    def remove(self, sequence: Sequence) -> None:
        """Remove a finished or cancelled sequence and release its blocks."""
        (self.waiting if sequence in self.waiting else self.running).remove(sequence)
        self._release(sequence)

    def _schedule_prefill(self, budget: int) -> list[ScheduledChunk]:
        """Chunks of prompts within a token budget."""
        chunks, being_computed = list[ScheduledChunk](), set[BlockKey]()
        for sequence in self.running:
            if sequence.num_remaining > 1 and budget:
                self._reuse_cached(sequence)
                key = sequence.next_block_key()
                if key in being_computed and sequence.may_reuse_next_block():
                    continue
                if key is not None and self.block_pool.prefix_caching:
                    being_computed.add(key)
                limit = max(sequence.first_scored - sequence.num_computed, 0) + MAX_SCORED
                chunks.append(ScheduledChunk(sequence, min(budget, limit, sequence.num_remaining)))
                budget -= chunks[-1].num_tokens
        return chunks

    def _admit(self, sequence: Sequence) -> bool:
        """Reserve all blocks of a sequence, cached prefix included."""
        self._reuse_cached(sequence)
        blocks = self.block_pool.allocate(sequence.blocks_needed - len(sequence.block_table))
        if blocks is None:
            self._release(sequence)
            sequence.reset()
            return False
        sequence.block_table += blocks
        return True

    def _reuse_cached(self, sequence: Sequence) -> None:
        """Skip prompt blocks that are already computed, replacing the sequence's own blocks by the cached ones."""
        size = self.block_pool.block_size
        while sequence.may_reuse_next_block() and (key := sequence.next_block_key()) and (hit := self.block_pool.lookup(key)):
            block, sequence.content_id = hit
            self.block_pool.acquire(block)
            index = sequence.num_registered // size
            self.block_pool.release(sequence.block_table[index : index + 1])
            sequence.block_table[index : index + 1] = [block]
            sequence.num_computed = sequence.num_registered = sequence.num_registered + size
            sequence.num_cached += size

    def _release(self, sequence: Sequence) -> None:
        self.block_pool.release(reversed(sequence.block_table))
        sequence.block_table = []
