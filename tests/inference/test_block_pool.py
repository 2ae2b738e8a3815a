"""The pool of pages against a naive one, under random histories: what is found is what was written, and no page is lost."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bumblebee.inference.block_pool import ROOT, Pages

TOTAL, SIZE = 8, 2


class Histories(RuleBasedStateMachine):
    """Sequences over two letters, which often begin alike, come and go.

    The naive pool: what was written to each page (all tokens up to its end), and a list of unused known pages, oldest first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages(TOTAL, SIZE)
        self.written: dict[int, tuple[int, ...]] = {}  # page -> all tokens of its sequence up to the page's end
        self.known: dict[tuple[int, ...], int] = {}  # such tokens -> the first page that held them and was kept since
        self.unused: list[int] = []
        self.live: list[list[int]] = []

    def references(self, page: int) -> int:
        return sum(pages.count(page) for pages in self.live)

    @rule(tokens=st.lists(st.integers(0, 1), max_size=SIZE * TOTAL), extra=st.integers(0, 2))
    def begin(self, tokens, extra):
        """Take known pages, write the others, keep the full ones; ``extra`` pages stay without a name."""
        full, parent, held = len(tokens) // SIZE, ROOT, []
        for place in range(full):
            prefix = tuple(tokens[: (place + 1) * SIZE])
            found = self.pages.find((parent, prefix[-SIZE:]))
            assert (found is not None) == (prefix in self.known), "found exactly if it is known"
            if found is None:
                break
            assert self.written[found[0]] == prefix, "it holds these very tokens, behind these very tokens"
            self.pages.hold(found[0])
            held.append(found[0])
            parent = found[1]
        self.unused = [page for page in self.unused if page not in held]
        used = len({page for pages in self.live for page in pages} | set(held))
        new = self.pages.allocate(full - len(held) + extra)
        assert (new is None) == (full - len(held) + extra > TOTAL - used), "given if and only if there are so many"
        if new is None:
            self.pages.release(reversed(held))
            self.unused += [page for page in reversed(held) if self.references(page) == 0]
            return
        self.forget_for(new)
        for place, page in zip(range(len(held), full), new, strict=False):
            prefix = tuple(tokens[: (place + 1) * SIZE])
            self.written[page] = prefix
            parent = self.pages.keep(page, (parent, prefix[-SIZE:]))
            self.known.setdefault(prefix, page)
        self.live.append(held + new)

    def forget_for(self, new: list[int]) -> None:
        """The oldest unused pages have gone, no more than were needed."""
        assert not set(new) & {page for pages in self.live for page in pages}, "a page has one owner"
        gone = [page for page in self.unused if page in new]
        assert gone == self.unused[: len(gone)], "least recently used first"
        self.unused = [page for page in self.unused if page not in new]
        self.known = {prefix: page for prefix, page in self.known.items() if page not in new}

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data):
        pages = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.pages.release(reversed(pages))
        named = set(self.known.values())
        self.unused += [page for page in reversed(pages) if page in named and self.references(page) == 0]

    @invariant()
    def every_page_is_free_or_cached_or_used(self):
        assert self.pages.free + self.pages.cached + self.pages.used == TOTAL
        assert self.pages.used == len({page for pages in self.live for page in pages})
        assert self.pages.cached == len(self.unused)

    def teardown(self):
        for pages in self.live:
            self.pages.release(reversed(pages))
        assert self.pages.free + self.pages.cached == TOTAL and self.pages.used == 0


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=150, stateful_step_count=40)


def test_a_page_is_not_found_behind_another_parent():
    """The same tokens after other tokens have other keys and values."""
    pages = Pages(4, SIZE)
    first, second, child = pages.allocate(3)
    one, two = pages.keep(first, (ROOT, (1, 1))), pages.keep(second, (ROOT, (2, 2)))
    identity = pages.keep(child, (one, (3, 3)))
    assert pages.find((one, (3, 3))) == (child, identity)
    assert pages.find((two, (3, 3))) is None and pages.find((ROOT, (3, 3))) is None


def test_a_child_is_not_found_when_its_parent_has_gone_and_come_back():
    """The parent's page is known anew, perhaps in another place, and has another identity."""
    pages = Pages(2, SIZE)
    parent, child = pages.allocate(2)
    before = pages.keep(parent, (ROOT, (1, 1)))
    pages.keep(child, (before, (2, 2)))
    pages.release([parent])
    pages.release([child])  # the wrong order: the parent goes first
    (page,) = pages.allocate(1)
    after = pages.keep(page, (ROOT, (1, 1)))
    assert after != before and pages.find((after, (2, 2))) is None


def test_without_reuse_nothing_is_cached():
    pages = Pages(2, SIZE, reuse=False)
    (page,) = pages.allocate(1)
    pages.keep(page, (ROOT, (1, 1)))
    assert pages.find((ROOT, (1, 1))) is None
    pages.release([page])
    assert (pages.free, pages.cached, pages.used) == (2, 0, 0)


def test_a_page_that_is_given_back_too_often_is_noticed():
    pages = Pages(1, SIZE)
    held = pages.allocate(1)
    pages.release(held)
    with pytest.raises(AssertionError, match="page 0 is given back too often"):
        pages.release(held)
