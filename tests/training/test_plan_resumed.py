"""A plan that resumes another one, with other ranks or batch sizes: no sample is repeated or skipped."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bumblebee.training.plan import Plan, Position

sizes = st.integers(1, 4)


def used(plan: Plan, first: int, last: int) -> list[tuple[int, int]]:
    """(epoch, sample) of all ranks in steps ``first`` to ``last``, in order of use."""
    samples = []
    for step in range(first, last):
        batches = [batch for rank in range(plan.world_size) for batch in plan.window(step, rank)]
        samples += sorted((batch.epoch, sample) for batch in batches for sample in range(batch.first, batch.last))
    return samples


@given(st.integers(1, 40), sizes, sizes, sizes, sizes, sizes, sizes, st.data())
def test_every_sample_is_used_once_per_epoch_across_a_resume(
    samples: int, micro: int, accumulate: int, ranks: int, micro2: int, accumulate2: int, ranks2: int, data: st.DataObject
) -> None:
    epochs = 3
    before = Plan.of(samples, micro, accumulate, ranks, epochs, None)
    cut = data.draw(st.integers(0, before.max_steps))
    after = Plan.of(samples, micro2, accumulate2, ranks2, epochs, None, before.position(cut))
    whole = used(before, 0, cut) + used(after, cut, after.max_steps)
    assert whole == [(epoch, sample) for epoch in range(epochs) for sample in range(samples)]
    assert after.epoch(after.max_steps) == epochs


@given(st.integers(1, 40), sizes, sizes, sizes, st.floats(0.1, 4), st.data())
def test_a_resumed_plan_equals_the_uninterrupted_one(
    samples: int, micro: int, accumulate: int, ranks: int, epochs: float, data: st.DataObject
) -> None:
    whole = Plan.of(samples, micro, accumulate, ranks, epochs, None)
    cut = data.draw(st.integers(0, whole.max_steps))
    resumed = Plan.of(samples, micro, accumulate, ranks, epochs, None, whole.position(cut))
    assert resumed.max_steps == whole.max_steps
    for step in range(cut, whole.max_steps):
        assert resumed.epoch(step) == whole.epoch(step)
        assert [resumed.window(step, rank) for rank in range(ranks)] == [whole.window(step, rank) for rank in range(ranks)]


def test_a_longer_run_continues_where_a_shorter_one_ended() -> None:
    short = Plan.of(10, 2, 2, 1, 1.0, None)
    assert short.position(short.max_steps) == Position(3, 1, 0)
    longer = Plan.of(10, 2, 2, 1, 2.0, None, short.position(short.max_steps))
    assert longer.max_steps == 6 and longer.window(3, 0)[0].epoch == 1


def test_max_steps_includes_the_steps_before_a_resume() -> None:
    assert Plan.of(10, 1, 1, 1, 3.0, 7, Position(5, 0, 5)).max_steps == 7


@given(st.integers(1, 30), sizes, sizes, sizes, sizes, st.data())
def test_rollout_batches_repeat_their_windows_in_order(
    samples: int, micro: int, accumulate: int, together: int, times: int, data: st.DataObject
) -> None:
    """Against windows of a plan without rollout batches, dealt naively; also if it resumes anywhere."""
    plain = Plan.of(samples, micro, accumulate, 2, 2, None)
    expected = []
    for epoch in range(2):
        windows = [plain.window(epoch * plain.steps_per_epoch + index, 1) for index in range(plain.steps_per_epoch)]
        for first in range(0, len(windows), together):
            expected += windows[first : first + together] * times
    plan = Plan.of(samples, micro, accumulate, 2, 2, None, steps_per_rollout=together, rollout_epochs=times)
    assert [plan.window(step, 1) for step in range(plan.max_steps)] == expected
    cut = data.draw(st.integers(0, plan.max_steps))
    resumed = Plan.of(samples, micro, accumulate, 2, 2, None, plan.position(cut), together, times)
    assert resumed.max_steps == plan.max_steps
    for step in range(cut, plan.max_steps):
        assert (resumed.window(step, 1), resumed.rollout(step)) == (plan.window(step, 1), plan.rollout(step))
        assert resumed.epoch(step) == plan.epoch(step) <= plan.epoch(step + 1)
