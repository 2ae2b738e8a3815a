"""Scheduler: first come, first served, no starvation, and common prefixes are computed once."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bumblebee.inference.block_pool import BlockPool
from bumblebee.inference.request import EngineRequest
from bumblebee.inference.sampling.sampling_params import SamplingParams
from bumblebee.inference.scheduler import Scheduler
from bumblebee.inference.sequence import Sequence

SIZE, MAX_POSITIONS = 4, 64
names = itertools.count()


def sequence(prompt: list[int], new: int = 4) -> Sequence:
    return Sequence(EngineRequest(str(next(names)), prompt, SamplingParams(max_new_tokens=new)), MAX_POSITIONS, SIZE)


def scheduler(
    *sequences: Sequence, blocks: int = 64, running: int = 16, tokens: int = 8, prefix_caching: bool = True
) -> Scheduler:
    queue = Scheduler(BlockPool(blocks, SIZE, prefix_caching), running, tokens)
    queue.waiting.extend(sequences)
    return queue


def step(scheduler: Scheduler) -> list[tuple[Sequence, int]]:
    """Run one step: every sampled token is 7, and sequences at their maximum length are removed."""
    planned = [(chunk.sequence, chunk.num_tokens, chunk.is_last, chunk) for chunk in scheduler.schedule()]
    for sequence, _, is_last, chunk in planned:
        scheduler.advance(chunk)
        if is_last:
            sequence.token_ids.append(7)
            if len(sequence.token_ids) == sequence.max_length:
                scheduler.remove(sequence)
    return [(sequence, count) for sequence, count, *_ in planned]


def finished(sequence: Sequence) -> bool:
    return len(sequence.token_ids) == sequence.max_length


def test_chunked_prefill_runs_with_decode_of_others():
    short, long = sequence([1, 2], new=9), sequence(list(range(20)))
    queue = scheduler(short, long, tokens=8)
    assert step(queue) == [(short, 2), (long, 6)]
    assert step(queue) == [(short, 1), (long, 7)]
    assert step(queue) == [(short, 1), (long, 7)]
    assert step(queue) == [(short, 1), (long, 1)]


def test_running_sequences_are_limited_by_step_tokens():
    sequences = [sequence([n, n]) for n in range(5)]
    queue = scheduler(*sequences, tokens=2)
    step(queue)
    assert queue.running == sequences[:2] and list(queue.waiting) == sequences[2:]


def test_head_of_the_queue_is_not_overtaken():
    running, large, small = sequence([0] * 8, new=9), sequence([1] * 20, new=8), sequence([2])
    queue = scheduler(running, large, small, blocks=9, tokens=32)  # they need 4, 7 and 1 blocks
    step(queue)
    assert queue.running == [running] and list(queue.waiting) == [large, small]
    while not finished(running):
        step(queue)
    step(queue)
    assert queue.running == [large, small]


def test_all_blocks_are_reserved_at_admission():
    first = sequence([0] * 8, new=9)
    queue = scheduler(first, sequence([1] * 8, new=9), blocks=7)
    queue.schedule()
    assert len(first.block_table) == first.blocks_needed == 4
    assert (queue.block_pool.num_used, queue.block_pool.num_free) == (4, 3) and len(queue.waiting) == 1


def test_simultaneous_common_prefix_is_computed_once():
    common = list(range(17))
    sequences = [sequence([*common, n]) for n in range(20, 24)]
    queue = scheduler(*sequences, tokens=8)
    computed = {each: 0 for each in sequences}
    for _ in range(20):
        for each, count in step(queue):
            computed[each] += count
    assert all(map(finished, sequences))
    assert [computed[each] for each in sequences] == [18 + 3, 2 + 3, 2 + 3, 2 + 3], "the last new token is never computed"
    assert [each.num_cached for each in sequences] == [0, 16, 16, 16]


def test_prefix_is_computed_after_its_owner_is_cancelled():
    common = list(range(30))
    first, second = sequence(common), sequence([*common, 1])
    queue = scheduler(first, second, tokens=8)
    assert step(queue) == [(first, 8)]
    assert step(queue) == [(first, 8)]
    queue.remove(first)
    assert step(queue) == [(second, 8)]
    assert second.num_cached == 16 and second.num_computed == 24


def test_nothing_waits_without_prefix_caching():
    first, second = sequence(list(range(20))), sequence(list(range(20)))
    queue = scheduler(first, second, tokens=32, prefix_caching=False)
    assert step(queue) == [(first, 20), (second, 12)]


def test_last_prompt_token_is_always_computed():
    first, second = sequence([0] * 8), sequence([0] * 8)
    queue = scheduler(first, tokens=32)
    while not finished(first):
        step(queue)
    queue.waiting.append(second)
    assert step(queue) == [(second, 4)], "the second block holds the last token"
    assert second.num_cached == 4


@pytest.mark.parametrize("prefix_caching", [True, False])
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=24), st.integers(1, 6)), min_size=1, max_size=8),
    st.integers(8, 20),
    st.integers(1, 5),
    st.integers(1, 9),
    st.data(),
)
def test_all_sequences_are_admitted_in_order_and_finish(prefix_caching, specs, blocks, running, tokens, data):
    """Also with cancellations. Each step advances the oldest sequence and every sequence in decode."""
    sequences = [sequence(*spec) for spec in specs]
    queue = scheduler(*sequences, blocks=blocks, running=running, tokens=tokens, prefix_caching=prefix_caching)
    cancelled: set[Sequence] = set()
    for _ in range(sum(each.max_length for each in sequences) + 1):
        if data.draw(st.integers(0, 9)) == 0 and (there := [*queue.running, *queue.waiting]):
            chosen = data.draw(st.sampled_from(there))
            cancelled.add(chosen)
            queue.remove(chosen)
        oldest = queue.running[:1]
        decoding = [each for each in queue.running if each.num_remaining == 1]
        before, queued = {each: each.num_computed for each in sequences}, list(queue.waiting)
        planned = step(queue)
        assert sum(count for _, count in planned) <= tokens
        assert bool(planned) == any(each not in cancelled and before[each] < each.max_length - 1 for each in sequences)
        assert list(queue.waiting) == queued[len(queued) - len(queue.waiting) :], "admitted in order"
        running_now = [each for each, _ in planned]
        assert all(each.num_computed > before[each] for each in running_now)
        assert set(decoding) <= set(running_now)
        assert set(oldest) <= set(running_now)
        assert queue.block_pool.num_free + queue.block_pool.num_cached + queue.block_pool.num_used == blocks
    assert all(finished(each) or each in cancelled for each in sequences)
    assert queue.block_pool.num_free + queue.block_pool.num_cached == blocks
