"""Blocks of the KV cache: reference counts and prefix caching.

A block holds ``block_size`` consecutive positions of a sequence. A block is *used* while sequences refer to it, *cached* when
none does but its content is known, and *free* otherwise: free + cached + used = total.

A full block is looked up by the id of its parent's content and its own token ids, so a hit is verified along the whole prefix
and never rests on a hash alone. Content ids are never reused: a block whose parent was evicted cannot be returned by mistake.
Sequences release their blocks last to first, so the least recently used block, which is evicted first, never has cached
children that could still be reached.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable

ROOT = 0  # content id before the first block
BlockKey = tuple[int, tuple[int, ...]]  # content id of the parent, token ids of the block


class BlockPool:
    """A fixed number of blocks, with least-recently-used eviction of cached ones.

    Args:
        num_blocks: blocks in the pool.
        block_size: positions per block.
        prefix_caching: keep the content of released blocks for later prompts with the same prefix.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        self.num_blocks, self.block_size, self.prefix_caching = num_blocks, block_size, prefix_caching
        self._content_ids = itertools.count(ROOT + 1)
        self._ref_counts = [0] * num_blocks
        self.reset()

    def reset(self) -> None:
        """Drop all cached content. No block may be in use."""
        assert not any(self._ref_counts)
        self._free = list(range(self.num_blocks - 1, -1, -1))  # a stack: the lowest index is on top
        self._cache: dict[BlockKey, tuple[int, int]] = {}  # -> (block, content id)
        self._keys: dict[int, BlockKey] = {}  # block -> its key in the cache
        self._unused: OrderedDict[int, None] = OrderedDict()  # cached blocks without references, least recently used first

    @property
    def num_free(self) -> int:
        """Blocks without content."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks with known content that no sequence refers to."""
        return len(self._unused)

    @property
    def num_used(self) -> int:
        """Blocks that sequences refer to."""
        return sum(count > 0 for count in self._ref_counts)

    def lookup(self, key: BlockKey) -> tuple[int, int] | None:
        """Return the block with this content and its content id, or None."""
        return self._cache.get(key)

    def acquire(self, block: int) -> None:
        """Add a reference to a cached block."""
        self._unused.pop(block, None)
        self._ref_counts[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """Return empty blocks with one reference each, evicting cached ones; None (and no change) if there are too few."""
        if count > self.num_free + self.num_cached:
            return None
        while self.num_free < count:
            self._evict()
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def register(self, block: int, key: BlockKey) -> int:
        """Record the content of a filled block; returns its content id, which another block may already have."""
        if (known := self._cache.get(key)) is not None:
            return known[1]
        content_id = next(self._content_ids)
        if self.prefix_caching:
            self._cache[key], self._keys[block] = (block, content_id), key
        return content_id

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference to each block. Pass the blocks of a sequence last to first."""
        for block in blocks:
            self._ref_counts[block] -= 1
            assert self._ref_counts[block] >= 0, f"block {block} is released too often"
            if self._ref_counts[block] == 0 and block in self._keys:
                self._unused[block] = None
            elif self._ref_counts[block] == 0:
                self._free.append(block)

    def _evict(self) -> None:
        """Free the least recently used cached block."""
        block, _ = self._unused.popitem(last=False)
        del self._cache[self._keys.pop(block)]
        self._free.append(block)
