"""What the loader promises: the order follows from (seed, epoch), and any step can be started from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bumblebee.datamodule import DataModule
from bumblebee.nn import IGNORE_INDEX
from bumblebee.training.loader import GROUP, epoch_order, train_windows, validation_batches
from bumblebee.training.plan import Plan


class Numbers(DataModule):
    """Sample i is the number i, and a micro-batch shows which it has."""

    def __init__(self, samples: int, held_out: int = 0) -> None:
        self.train = range(samples)
        self.validation = range(held_out) if held_out else None

    def setup(self, seed: int) -> None:
        """Nothing to prepare."""

    def collate(self, samples: list[int]) -> dict[str, torch.Tensor]:
        ids = torch.tensor(samples)
        return {"input_ids": ids, "labels": ids.clone()}


def windows(plan: Plan, rank: int = 0, first_step: int = 0, seed: int = 1, workers: int = 0) -> list[list[list[int]]]:
    """[step][micro-batch] -> labels."""
    made = train_windows(Numbers(plan.samples), plan, seed, rank, first_step, workers, pin_memory=False)
    return [[batch["labels"].tolist() for batch in window] for window in made]


def flat(steps: list[list[list[int]]]) -> list[int]:
    return [sample for window in steps for batch in window for sample in batch if sample != IGNORE_INDEX]


@given(st.integers(1, 100), st.integers(0, 5), st.integers(0, 5))
def test_order_is_a_function_of_seed_and_epoch(samples, seed, epoch):
    order = epoch_order(samples, seed, epoch)
    assert sorted(order) == list(range(samples))
    np.random.random(3)
    epoch_order(samples, seed, epoch + 1)
    assert (epoch_order(samples, seed, epoch) == order).all()


LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=400)


@given(LENGTHS, st.integers(0, 5), st.integers(0, 5))
def test_order_by_length_is_a_function_of_seed_and_epoch(lengths, seed, epoch):
    order = epoch_order(len(lengths), seed, epoch, np.array(lengths))
    assert sorted(order) == list(range(len(lengths)))
    np.random.random(3)
    assert (epoch_order(len(lengths), seed, epoch, np.array(lengths)) == order).all()


@given(LENGTHS, st.integers(0, 5))
def test_a_group_is_a_range_of_the_sorted_lengths(lengths, epoch):
    """Naively: where the order is cut into its groups, each is a stretch of the sorted lengths."""
    order = epoch_order(len(lengths), 1, epoch, np.array(lengths)).tolist()
    rest = len(lengths) % GROUP
    ordered = sorted(lengths)
    stretches = [ordered[at : at + GROUP] for at in range(0, len(lengths), GROUP)]
    at = 0
    while order[at:]:
        # The one smaller group may be anywhere: take it where it fits, and whole groups elsewhere.
        for size in (GROUP, rest):
            own = [lengths[index] for index in order[at : at + size]]
            if size and own in stretches:
                stretches.remove(own)
                at += size
                break
        else:
            raise AssertionError(f"no stretch of the sorted lengths begins at {at}")
    assert not stretches


def test_batches_by_length_need_little_padding():
    random = np.random.default_rng(0)
    lengths = random.lognormal(5, 0.8, 20_000).astype(int) + 1

    def padding(order: np.ndarray) -> float:
        batches = lengths[order].reshape(-1, 8)
        return 1 - lengths.sum() / (batches.max(axis=1).sum() * 8)

    shuffled, grouped = padding(epoch_order(20_000, 1, 0)), padding(epoch_order(20_000, 1, 0, lengths))
    assert shuffled > 0.4 and grouped < 0.03


def test_orders_by_length_differ_between_epochs_and_are_not_sorted():
    lengths = np.arange(1000)
    first, second = (epoch_order(1000, 1, epoch, lengths) for epoch in (0, 1))
    assert (first != second).any()
    assert abs(np.corrcoef(np.arange(1000), lengths[first])[0, 1]) < 0.5


def test_orders_of_other_seeds_and_epochs_differ():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_each_epoch_has_every_sample_once_in_another_order():
    plan = Plan.of(23, 2, 3, 1, epochs=3, max_steps=None)
    steps = windows(plan)
    epochs = [flat(steps[at : at + plan.steps_per_epoch]) for at in range(0, len(steps), plan.steps_per_epoch)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(23))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("first_step", [1, 3, 4, 5, 9, 12])
def test_starting_at_a_step_equals_running_to_it(first_step):
    plan = Plan.of(23, 2, 3, 1, epochs=3, max_steps=None)  # 4 steps an epoch: 4 and 12 are edges
    assert windows(plan, first_step=first_step) == windows(plan)[first_step:]


def test_starting_at_a_step_reads_no_earlier_samples():
    class Watched(Numbers):
        seen: list[int] = []

        def collate(self, samples):
            self.seen.extend(samples)
            return super().collate(samples)

    plan = Plan(40, 2, 2, 1, max_steps=10)
    data = Watched(40)
    next(train_windows(data, plan, 1, 0, 9, 0, pin_memory=False))
    assert len(data.seen) == 4


def test_ranks_partition_each_step():
    alone = Plan(45, 2, 6, 1, max_steps=8)
    shared = Plan(45, 2, 2, 3, max_steps=8)
    of_ranks = [windows(shared, rank) for rank in range(3)]
    for step, window in enumerate(windows(alone)):
        together = [sample for steps in of_ranks for sample in flat([steps[step]])]
        assert sorted(together) == sorted(flat([window]))


def test_batches_by_length_partition_each_step_and_resume():
    class Long(Numbers):
        def __init__(self, samples: int) -> None:
            super().__init__(samples)
            self.lengths = np.random.default_rng(0).integers(1, 100, samples)

    def made(plan: Plan, rank: int = 0, first_step: int = 0) -> list[list[list[int]]]:
        steps = train_windows(Long(plan.samples), plan, 1, rank, first_step, 0, pin_memory=False)
        return [[batch["labels"].tolist() for batch in window] for window in steps]

    alone, shared = Plan(200, 2, 6, 1, max_steps=30), Plan(200, 2, 2, 3, max_steps=30)
    whole, of_ranks = made(alone), [made(shared, rank) for rank in range(3)]
    for step, window in enumerate(whole):
        assert sorted(sample for steps in of_ranks for sample in flat([steps[step]])) == sorted(flat([window]))
    assert made(alone, first_step=18) == whole[18:]
    assert sorted(flat(whole[: alone.steps_per_epoch])) == list(range(200))


def test_a_rank_without_samples_gets_batches_without_targets():
    plan = Plan(9, 2, 2, 2, max_steps=2)  # the second step has one sample, for rank 0
    first, second = windows(plan, rank=0), windows(plan, rank=1)
    assert len(first[1]) == len(second[1]) == 1
    assert len(flat([first[1]])) == 1
    assert second[1] == [[IGNORE_INDEX]]


def test_removing_targets_does_not_change_the_sample():
    class Views(Numbers):
        def __init__(self):
            super().__init__(9)
            self.train = torch.arange(9)[:, None]

        def collate(self, samples):
            return {"labels": samples[0]}  # the sample itself, not a copy

    data, plan = Views(), Plan(9, 1, 4, 2, max_steps=4)
    made = [batch["labels"].item() for window in train_windows(data, plan, 1, 1, 0, 0, pin_memory=False) for batch in window]
    assert IGNORE_INDEX in made
    assert data.train.flatten().tolist() == list(range(9))


@pytest.mark.parametrize("first_step", [0, 5])
def test_worker_processes_yield_the_same_batches(first_step):
    plan = Plan(23, 2, 3, 2, max_steps=7)
    for rank in (0, 1):
        assert windows(plan, rank, first_step, workers=2) == windows(plan, rank, first_step)


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 4))
def test_validation_batches_of_ranks_have_each_sample_once(held_out, batch_size, ranks):
    data = Numbers(1, held_out)
    of_ranks = [list(validation_batches(data, batch_size, rank, ranks)) for rank in range(ranks)]
    assert len({len(batches) for batches in of_ranks}) == 1
    assert all(len(batch["labels"]) <= batch_size for batches in of_ranks for batch in batches)
    seen = [label for batches in of_ranks for batch in batches for label in batch["labels"].tolist() if label != IGNORE_INDEX]
    assert sorted(seen) == list(range(held_out))


def test_no_validation_samples_yield_no_batches():
    assert list(validation_batches(Numbers(5), 2, 0, 1)) == []
