"""BlockPool against a naive model under random histories: hits hold the right tokens, and no block is lost."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bumblebee.inference.block_pool import ROOT, BlockPool

TOTAL, SIZE = 8, 2


class Histories(RuleBasedStateMachine):
    """Sequences over two tokens, which often share prefixes, come and go.

    The naive model: the tokens written to each block (all up to its end), and a list of unused known blocks, oldest first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL, SIZE)
        self.written: dict[int, tuple[int, ...]] = {}  # block -> all tokens of its sequence up to the block's end
        self.known: dict[tuple[int, ...], int] = {}  # such tokens -> the first block that held them and was kept since
        self.unused: list[int] = []
        self.live: list[list[int]] = []

    def references(self, block: int) -> int:
        return sum(blocks.count(block) for blocks in self.live)

    @rule(tokens=st.lists(st.integers(0, 1), max_size=SIZE * TOTAL), extra=st.integers(0, 2))
    def begin(self, tokens, extra):
        """Acquire known blocks, write the others, register the full ones; ``extra`` blocks are never registered."""
        full, parent, held = len(tokens) // SIZE, ROOT, []
        for index in range(full):
            prefix = tuple(tokens[: (index + 1) * SIZE])
            hit = self.pool.lookup((parent, prefix[-SIZE:]))
            assert (hit is not None) == (prefix in self.known), "found if and only if known"
            if hit is None:
                break
            assert self.written[hit[0]] == prefix, "the same tokens after the same prefix"
            self.pool.acquire(hit[0])
            held.append(hit[0])
            parent = hit[1]
        self.unused = [block for block in self.unused if block not in held]
        used = len({block for blocks in self.live for block in blocks} | set(held))
        new = self.pool.allocate(full - len(held) + extra)
        assert (new is None) == (full - len(held) + extra > TOTAL - used), "allocated if and only if there are enough"
        if new is None:
            self.pool.release(reversed(held))
            self.unused += [block for block in reversed(held) if self.references(block) == 0]
            return
        self.check_evicted(new)
        for index, block in zip(range(len(held), full), new, strict=False):
            prefix = tuple(tokens[: (index + 1) * SIZE])
            self.written[block] = prefix
            parent = self.pool.register(block, (parent, prefix[-SIZE:]))
            self.known.setdefault(prefix, block)
        self.live.append(held + new)

    def check_evicted(self, new: list[int]) -> None:
        """The least recently used blocks were evicted, no more than needed."""
        assert not set(new) & {block for blocks in self.live for block in blocks}, "a block has one owner"
        evicted = [block for block in self.unused if block in new]
        assert evicted == self.unused[: len(evicted)], "least recently used first"
        self.unused = [block for block in self.unused if block not in new]
        self.known = {prefix: block for prefix, block in self.known.items() if block not in new}

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data):
        blocks = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.pool.release(reversed(blocks))
        registered = set(self.known.values())
        self.unused += [block for block in reversed(blocks) if block in registered and self.references(block) == 0]

    @invariant()
    def every_block_is_free_cached_or_used(self):
        assert self.pool.num_free + self.pool.num_cached + self.pool.num_used == TOTAL
        assert self.pool.num_used == len({block for blocks in self.live for block in blocks})
        assert self.pool.num_cached == len(self.unused)

    def teardown(self):
        for blocks in self.live:
            self.pool.release(reversed(blocks))
        assert self.pool.num_free + self.pool.num_cached == TOTAL and self.pool.num_used == 0


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=150, stateful_step_count=40)


def test_block_is_not_found_after_another_parent():
    """The keys and values of the same tokens differ after another prefix."""
    pool = BlockPool(4, SIZE)
    first, second, child = pool.allocate(3)
    one, two = pool.register(first, (ROOT, (1, 1))), pool.register(second, (ROOT, (2, 2)))
    content_id = pool.register(child, (one, (3, 3)))
    assert pool.lookup((one, (3, 3))) == (child, content_id)
    assert pool.lookup((two, (3, 3))) is None and pool.lookup((ROOT, (3, 3))) is None


def test_child_is_not_found_after_its_parent_was_evicted():
    """The parent is registered again, perhaps in another block, with a new content id."""
    pool = BlockPool(2, SIZE)
    parent, child = pool.allocate(2)
    before = pool.register(parent, (ROOT, (1, 1)))
    pool.register(child, (before, (2, 2)))
    pool.release([parent])
    pool.release([child])  # the wrong order: the parent is evicted first
    (block,) = pool.allocate(1)
    after = pool.register(block, (ROOT, (1, 1)))
    assert after != before and pool.lookup((after, (2, 2))) is None


def test_nothing_is_cached_without_prefix_caching():
    pool = BlockPool(2, SIZE, prefix_caching=False)
    (block,) = pool.allocate(1)
    pool.register(block, (ROOT, (1, 1)))
    assert pool.lookup((ROOT, (1, 1))) is None
    pool.release([block])
    assert (pool.num_free, pool.num_cached, pool.num_used) == (2, 0, 0)


def test_double_release_raises():
    pool = BlockPool(1, SIZE)
    held = pool.allocate(1)
    pool.release(held)
    with pytest.raises(AssertionError, match="block 0 is released too often"):
        pool.release(held)
