"""Packing equals naive references that look at every window and every target."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from datamodules.packing import best_fit, pack, split_into_chunks

LENGTHS = st.lists(st.integers(0, 70), max_size=60)  # tokens of each document
CAPACITY = st.integers(1, 25)


def places(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Begins and ends of consecutive sequences."""
    ends = np.cumsum([0, *lengths])
    return ends[:-1], ends[1:]


def naive_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The room in the window of each chunk before it is added: of all windows with enough room, take the fullest."""
    rooms, chosen = [], []
    for length in lengths:
        fitting = [room for room in rooms if room >= length]
        room = min(fitting, default=capacity)
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
        chosen.append(room)
    return chosen


@given(st.lists(st.integers(1, 25), max_size=80), st.integers(25, 40))
def test_best_fit_equals_the_naive_algorithm(lengths, capacity):
    lengths.sort(reverse=True)
    windows = best_fit(lengths, capacity)
    assert sorted(chunk for window in windows for chunk in window) == list(range(len(lengths)))
    room_before = {}
    for window in windows:
        room = capacity
        for chunk in window:
            room_before[chunk] = room
            room -= lengths[chunk]
        assert room >= 0
    assert [room_before[chunk] for chunk in range(len(lengths))] == naive_best_fit(lengths, capacity)


@given(LENGTHS, CAPACITY)
def test_every_target_is_packed_exactly_once(lengths, max_length):
    begins, ends = places(lengths)
    windows = pack(begins, ends, max_length)
    trained = []
    for number in range(len(windows)):
        chunks = windows.chunks(number)
        assert chunks and 1 <= sum(targets for _, targets in chunks) <= max_length
        trained += [start + 1 + at for start, targets in chunks for at in range(targets)]
    expected = [token for begin, end in zip(begins, ends, strict=True) for token in range(begin + 1, end)]
    assert sorted(trained) == expected


@given(LENGTHS, CAPACITY)
def test_long_sequence_is_split_into_full_chunks_and_a_rest(lengths, max_length):
    begins, ends = places(lengths)
    starts, targets = split_into_chunks(begins, ends, max_length)
    chunks = list(zip(starts.tolist(), targets.tolist(), strict=True))
    reference = [
        (start, min(max_length, end - 1 - start))
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
        for start in range(begin, end - 1, max_length)
    ]
    assert chunks == reference


@given(LENGTHS, CAPACITY)
def test_no_chunk_crosses_a_sequence_boundary(lengths, max_length):
    begins, ends = places(lengths)
    windows = pack(begins, ends, max_length)
    for start, targets in (chunk for number in range(len(windows)) for chunk in windows.chunks(number)):
        document = int(np.searchsorted(ends, start, side="right"))
        assert begins[document] <= start and start + targets < ends[document]


@given(LENGTHS, CAPACITY)
def test_efficiency_is_the_share_of_filled_positions(lengths, max_length):
    windows = pack(*places(lengths), max_length)
    targets = sum(max(0, length - 1) for length in lengths)
    assert windows.efficiency == (targets / (len(windows) * max_length) if targets else 0.0)


@given(LENGTHS, CAPACITY)
def test_at_most_one_window_is_half_full_or_less(lengths, max_length):
    """Best fit guarantees it: two windows that are at most half full would share one."""
    windows = pack(*places(lengths), max_length)
    filled = [sum(targets for _, targets in windows.chunks(number)) for number in range(len(windows))]
    assert sum(2 * targets <= max_length for targets in filled) <= 1


def test_sequences_with_gaps_between_them_are_packed():
    """A split by content leaves gaps between sequences."""
    windows = pack(np.array([0, 10, 30]), np.array([4, 13, 36]), 16)
    assert windows.chunks(0) == [(30, 5), (0, 3), (10, 2)]


def test_nothing_to_pack_gives_no_windows():
    for lengths in ([], [0], [1, 1, 1]):
        assert len(pack(*places(lengths), 8)) == 0


def test_packing_is_deterministic():
    lengths = np.random.default_rng(0).integers(1, 300, 500).tolist()
    first, second = (pack(*places(lengths), 128) for _ in range(2))
    assert (first.starts == second.starts).all() and (first.bounds == second.bounds).all()
    assert first.efficiency > 0.98
