"""Dynamic sampling: groups whose rewards are all equal are replaced by groups of further prompts (DAPO, arXiv 2503.14476).

The advantages of such a group are 0, so nothing is learnt from it. Each prompt of a step has a place. In each round the places
without a useful group get further training prompts, in an order that depends on (seed, step, round) only, and a group of each
is sampled. A place that has no useful group after the last round is left out of the loss and of what it is divided by.

Places are served in the order of their first prompts in the data, over all ranks, so that the number of ranks does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch

from bumblebee.datamodule import Batch
from bumblebee.distributed import process_group
from bumblebee.rl.rollout import Rollout
from bumblebee.rl.training_batch import logged_of

Group = list[Rollout]


@dataclass
class Place:
    """What has been sampled for a prompt of a step.

    Args:
        groups: of its own prompt, then of further ones.
        excluded: whether the last group is left out of the loss.
    """

    groups: list[Group]
    excluded: bool = False

    @property
    def trained(self) -> list[Group]:
        """The group that is trained, if any."""
        return [group for group in self.groups if not self.left_out(group)]

    def left_out(self, group: Group) -> bool:
        """Whether a group of this place is not trained on."""
        return self.excluded or group is not self.groups[-1]


def fill_places(
    groups: Sequence[Group], pool: Sequence[int], seed: int, step: int, rounds: int, sample: Callable[[list[int]], list[Group]]
) -> list[Place]:
    """Replace the groups with equal rewards. Collective.

    Args:
        groups: with rewards, of this rank's prompts.
        pool: indices in the data of all prompts that may be drawn, the same on every rank.
        seed: of the run.
        step: optimizer steps done.
        rounds: maximum number of further rounds; 0 leaves all groups as they are, also those with equal rewards.
        sample: returns a group with rewards for each of some prompts; called on all ranks alike.

    Returns:
        The places, in the order of ``groups``.
    """
    places = [Place([group]) for group in groups]
    if rounds == 0:
        return places
    used = set(process_group.all_gather_items([group[0].prompt for group in groups]))
    for number in range(1, rounds + 1):
        unfilled = [place for place in places if has_equal_rewards(place.groups[-1])]
        firsts = [place.groups[0][0].prompt for place in unfilled]
        everywhere = sorted(process_group.all_gather_items(firsts))
        drawn = dict(zip(everywhere, _draws(pool, used, seed, step, number), strict=False))
        if not drawn:
            break
        used.update(drawn.values())
        served = [place for place, first in zip(unfilled, firsts, strict=True) if first in drawn]
        further = sample([drawn[place.groups[0][0].prompt] for place in served])
        for place, group in zip(served, further, strict=True):
            place.groups.append(group)
    for place in places:
        place.excluded = has_equal_rewards(place.groups[-1])
    return places


def has_equal_rewards(group: Group) -> bool:
    """Whether nothing is learnt from a group."""
    return all(rollout.reward == group[0].reward for rollout in group)


def with_sampled_groups(batch: Batch, places: Sequence[Place], rewards: int) -> Batch:
    """A batch of the groups that are trained, whose metrics of rewards are those of the groups that were sampled first.

    Those of the trained groups would say little: no prompt that the model always answers correctly is among them.

    Args:
        batch: of the trained groups.
        places: of the batch.
        rewards: number of reward functions.

    Returns:
        The batch, with the number of further groups of each place, and whether it is excluded: (places,).
    """
    return {
        **batch,
        **logged_of([place.groups[0] for place in places], rewards),
        "resampled": torch.tensor([len(place.groups) - 1 for place in places], dtype=torch.float64),
        "excluded": torch.tensor([place.excluded for place in places], dtype=torch.float64),
    }


def _draws(pool: Sequence[int], used: set[int], seed: int, step: int, number: int) -> Iterator[int]:
    """The prompts that are not used yet, in the random order of a round."""
    digest = blake2b(f"{seed} {step} {number} further prompts".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)
    order = torch.randperm(len(pool), generator=generator).tolist()
    return (index for index in (pool[at] for at in order) if index not in used)
