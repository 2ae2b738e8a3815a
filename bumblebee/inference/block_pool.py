"""Who owns which page of the key-value cache: a pool with reference counts, and the prefixes that it remembers.

A page holds ``size`` neighbouring positions of a sequence. It is *used* while requests refer to it, *cached* when none does but
its content is known, and *free* otherwise: free + cached + used = total.

A full page is known by its parent's identity and its own token ids, so a hit is verified by ids along the whole prefix, never
by a hash alone. Identities are numbers that are never given twice: a page whose parent is gone is not found by mistake.
Requests let go of their pages from the last to the first, so the least recently used page, which is taken when no page is free,
never has cached children that could still be found.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable

ROOT = 0  # the identity before the first page
Key = tuple[int, tuple[int, ...]]  # the parent's identity, and the page's token ids


class Pages:
    """The pool.

    Args:
        total: pages.
        size: positions of a page.
        reuse: remember prefixes; without it no page is ever cached.
    """

    def __init__(self, total: int, size: int, reuse: bool = True) -> None:
        self.total, self.size, self.reuse = total, size, reuse
        self._identities = itertools.count(ROOT + 1)
        self._references = [0] * total
        self.forget()

    def forget(self) -> None:
        """Remember no prefix; only when no page is used."""
        assert not any(self._references)
        self._free = list(range(self.total - 1, -1, -1))  # the lowest is taken first
        self._known: dict[Key, tuple[int, int]] = {}  # -> page and its identity
        self._keys: dict[int, Key] = {}  # of each known page
        self._unused: OrderedDict[int, None] = OrderedDict()  # known pages without references, least recently used first

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Known pages that no request refers to."""
        return len(self._unused)

    @property
    def used(self) -> int:
        """Pages that requests refer to."""
        return sum(count > 0 for count in self._references)

    def find(self, key: Key) -> tuple[int, int] | None:
        """The page with this content and its identity, or None."""
        return self._known.get(key)

    def hold(self, page: int) -> None:
        """Refer to a known page."""
        self._unused.pop(page, None)
        self._references[page] += 1

    def allocate(self, number: int) -> list[int] | None:
        """Pages with one reference and no content; None, and nothing changed, if there are not so many."""
        if number > self.free + self.cached:
            return None
        while self.free < number:
            self._evict()
        pages = [self._free.pop() for _ in range(number)]
        for page in pages:
            self._references[page] = 1
        return pages

    def keep(self, page: int, key: Key) -> int:
        """Remember what a used page holds now; returns the identity of this content, which may be another page's already."""
        if (known := self._known.get(key)) is not None:
            return known[1]
        identity = next(self._identities)
        if self.reuse:
            self._known[key], self._keys[page] = (page, identity), key
        return identity

    def release(self, pages: Iterable[int]) -> None:
        """Give back one reference to each page: those of a sequence, last page first."""
        for page in pages:
            self._references[page] -= 1
            assert self._references[page] >= 0, f"page {page} is given back too often"
            if self._references[page] == 0 and page in self._keys:
                self._unused[page] = None
            elif self._references[page] == 0:
                self._free.append(page)

    def _evict(self) -> None:
        """Free the least recently used cached page."""
        page, _ = self._unused.popitem(last=False)
        del self._known[self._keys.pop(page)]
        self._free.append(page)
