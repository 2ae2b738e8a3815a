"""The plan against a naive reference: deal an epoch's samples out by hand, card after card."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bumblebee.training.plan import Plan, SampleRange

COUNTS = st.integers(1, 6)
PLANS = st.builds(
    lambda samples, micro, accumulate, ranks, steps: Plan(samples, micro, accumulate, ranks, steps),
    st.integers(1, 90), COUNTS, COUNTS, COUNTS, st.integers(1, 30),
)  # fmt: skip


def dealt(plan: Plan, epoch: int) -> list[list[list[list[int]]]]:
    """[step][rank][micro-batch] -> samples, by dealing: a micro-batch to each rank in turn, until a step or the epoch ends."""
    cards, steps = list(range(plan.samples)), []
    while cards:
        step: list[list[list[int]]] = [[] for _ in range(plan.world_size)]
        for _ in range(plan.accumulate):
            if cards:
                for rank in range(plan.world_size):
                    step[rank].append([cards.pop(0) for _ in range(min(plan.micro_batch_size, len(cards)))])
        steps.append(step)
    return steps


def samples_of(places: list[SampleRange]) -> list[list[int]]:
    return [list(range(place.first, place.last)) for place in places]


@given(PLANS, st.integers(0, 3))
def test_windows_equal_the_naive_distribution(plan, epoch):
    reference = dealt(plan, epoch)
    assert plan.steps_per_epoch == len(reference)
    for index, step in enumerate(reference):
        for rank in range(plan.world_size):
            window = plan.window(epoch * plan.steps_per_epoch + index, rank)
            assert samples_of(window) == step[rank]
            assert {place.epoch for place in window} == {epoch}


@given(PLANS, st.integers(0, 3))
def test_an_epoch_has_each_sample_exactly_once(plan, epoch):
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    windows = [plan.window(step, rank) for step in steps for rank in range(plan.world_size)]
    used = [sample for window in windows for micro_batch in samples_of(window) for sample in micro_batch]
    assert sorted(used) == list(range(plan.samples))


@given(st.integers(1, 200), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.randoms(), st.integers(0, 40))
def test_samples_of_a_step_do_not_depend_on_their_distribution(samples, micro, accumulate, ranks, random, step):
    factors = [micro, accumulate, ranks]
    random.shuffle(factors)
    per_step = micro * accumulate * ranks

    def of(micro_batch_size, accumulate, ranks):
        plan = Plan(samples, micro_batch_size, accumulate, ranks, 100)
        windows = [plan.window(step, rank) for rank in range(ranks)]
        return plan.steps_per_epoch, sorted(s for window in windows for batch in samples_of(window) for s in batch)

    assert of(*factors) == of(per_step, 1, 1) == of(1, per_step, 1) == of(1, 1, per_step)


@given(PLANS, st.integers(0, 60))
def test_all_ranks_have_the_same_number_of_micro_batches(plan, step):
    counts = {len(plan.window(step, rank)) for rank in range(plan.world_size)}
    assert len(counts) == 1 and 1 <= counts.pop() <= plan.accumulate


@given(PLANS, st.integers(0, 60))
def test_rank_0_always_has_a_sample(plan, step):
    assert all(place.first < place.last for place in plan.window(step, 0))


def test_the_last_window_of_an_epoch_is_smaller_not_dropped():
    plan = Plan.of(samples=10, micro_batch_size=2, accumulate=2, world_size=1, epochs=2, max_steps=None)
    assert plan.max_steps == 6
    sizes = [sum(len(batch) for batch in samples_of(plan.window(step, 0))) for step in range(6)]
    assert sizes == [4, 4, 2, 4, 4, 2]


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 3), (3.0, 9), (0.5, 2), (0.01, 1), (1.34, 5), (2 / 3, 2), (2.0, 6)])
def test_a_fraction_of_an_epoch_is_rounded_up_to_whole_steps(epochs, steps):
    assert Plan.of(10, 2, 2, 1, epochs, None).max_steps == steps


@given(PLANS, st.floats(0.01, 20))
def test_planned_steps_are_the_fewest_that_reach_the_epochs(plan, epochs):
    steps = Plan.of(plan.samples, plan.micro_batch_size, plan.accumulate, plan.world_size, epochs, None).max_steps
    assert steps >= epochs * plan.steps_per_epoch - 1e-6
    assert steps - 1 < epochs * plan.steps_per_epoch + 1e-6


@given(PLANS, st.floats(0.1, 5), st.integers(1, 1000))
def test_max_steps_takes_precedence_over_epochs(plan, epochs, max_steps):
    made = Plan.of(plan.samples, plan.micro_batch_size, plan.accumulate, plan.world_size, epochs, max_steps)
    assert made.max_steps == max_steps


@given(PLANS)
def test_epochs_done_grow_with_each_step(plan):
    done = [plan.epoch(step) for step in range(3 * plan.steps_per_epoch + 1)]
    assert all(before < after for before, after in zip(done, done[1:], strict=False))
    assert done[:: plan.steps_per_epoch] == [0, 1, 2, 3]
    first = min(plan.samples_per_step, plan.samples)
    assert math.isclose(done[1], first / plan.samples)


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="nothing to train on"):
        Plan.of(0, 1, 1, 1, 1.0, None)
