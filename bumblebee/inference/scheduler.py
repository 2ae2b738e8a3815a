"""Which tokens does the next step compute? First come, first served, with continuous batching and chunked prompts.

A request is admitted when all pages that it can ever need are there, so none ends midway for lack of memory. The first in the
queue is never overtaken. Each step computes the next token of every growing sequence, and spends the rest of its tokens on
prompts, the oldest first. No more sequences run than a step has tokens, so some are always left for the oldest prompt.

Prompts that begin alike are computed once: while an older sequence computes a page that a younger one needs next, the younger
one waits, and takes the page over when it is there. Who is waited for always runs in the same step, so nobody waits for ever;
if it is cancelled, the younger one computes the page itself.
"""

from __future__ import annotations

from collections import deque

from bumblebee.inference.block_pool import Key, Pages
from bumblebee.inference.sequence import Chunk, Sequence


class Scheduler:
    """The queue and those who run.

    Args:
        pages: the pool.
        max_running: sequences that run at the same time.
        step_tokens: tokens of a step.
    """

    def __init__(self, pages: Pages, max_running: int, step_tokens: int) -> None:
        self.pages, self.max_running, self.step_tokens = pages, min(max_running, step_tokens), step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of admission

    def plan(self) -> list[Chunk]:
        """The chunks of the next step: single tokens first; changes nothing but admissions and pages taken over."""
        while self.waiting and len(self.running) < self.max_running and self._admit(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        chunks = [Chunk(sequence, 1) for sequence in self.running if sequence.remaining == 1]
        budget, being_computed = self.step_tokens - len(chunks), set[Key]()
        for sequence in self.running:
            if sequence.remaining > 1 and budget:
                self._take_over(sequence)
                key = sequence.next_page()
                if key in being_computed and sequence.computed == sequence.kept:
                    continue
                if key is not None and self.pages.reuse:
                    being_computed.add(key)
                chunks.append(Chunk(sequence, min(budget, sequence.remaining)))
                budget -= chunks[-1].count
        return chunks

    def advance(self, chunk: Chunk) -> None:
        """The chunk is computed: pages that it filled are remembered."""
        sequence, size = chunk.sequence, self.pages.size
        sequence.computed += chunk.count
        while (end := sequence.kept + size) <= sequence.computed:
            key = (sequence.identity, tuple(sequence.tokens[sequence.kept : end]))
            sequence.identity = self.pages.keep(sequence.pages[sequence.kept // size], key)
            sequence.kept = end

    def remove(self, sequence: Sequence) -> None:
        """It has ended, or will not begin."""
        (self.waiting if sequence in self.waiting else self.running).remove(sequence)
        self._give_back(sequence)

    def _admit(self, sequence: Sequence) -> bool:
        """Reserve all its pages, those of a known prefix among them."""
        self._take_over(sequence)
        new = self.pages.allocate(sequence.pages_needed - len(sequence.pages))
        if new is None:
            self._give_back(sequence)
            sequence.restart()
            return False
        sequence.pages += new
        return True

    def _take_over(self, sequence: Sequence) -> None:
        """Go on behind pages that are computed already: the sequence's own are given back for them."""
        size = self.pages.size
        while sequence.computed == sequence.kept and (key := sequence.next_page()) and (found := self.pages.find(key)):
            page, sequence.identity = found
            self.pages.hold(page)
            place = sequence.kept // size
            self.pages.release(sequence.pages[place : place + 1])
            sequence.pages[place : place + 1] = [page]
            sequence.computed = sequence.kept = sequence.kept + size
            sequence.cached_tokens += size

    def _give_back(self, sequence: Sequence) -> None:
        self.pages.release(reversed(sequence.pages))
        sequence.pages = []
