"""Training batches of completions: one row per completion, after its prompt.

Where completions differ much in length, the model computes them packed: one after the other, without padding.

Shapes: R completions (rows), G groups, T positions, F reward functions, N tokens of all rows without padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bumblebee.datamodule import Batch
from bumblebee.nn import IGNORE_INDEX
from bumblebee.rl.rollout import Rollout

MOST_PACKED = 0.9  # share of tokens that are not padding above which rows stay: packing takes work too
_OF_PLACES = ("resampled", "excluded")  # of dynamic sampling


def training_batch(prompts: Sequence[tuple[int, list[int]]], groups: Sequence[Sequence[Rollout]], advantages: Tensor) -> Batch:
    """One row per completion, padded on the right.

    Args:
        prompts: (index in the data, token ids).
        groups: the completions of each prompt.
        advantages: of the completions: (G, group size).

    Returns:
        What ``completion_rows`` returns (R, T), and its ``packed_form``; advantages, reward and truncated (R,);
        rewards (R, F); reward_std (G,).
    """
    rows = completion_rows(prompts, groups)
    return {
        **rows,
        **packed_form(rows),
        "advantages": advantages.flatten().float(),
        **logged_of(groups, len(groups[0][0].rewards)),
    }


def completion_rows(prompts: Sequence[tuple[int, list[int]]], groups: Sequence[Sequence[Rollout]]) -> Batch:
    """One row per completion, padded on the right: input_ids, labels, position_ids and sampled_log_probs (R, T)."""
    rollouts = [rollout for group in groups for rollout in group]
    rows = [(ids, *rollout.sequence) for (_, ids), group in zip(prompts, groups, strict=True) for rollout in group]
    shape = len(rows), max(len(ids) + len(completion) for ids, completion, _ in rows) - 1
    input_ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX)
    sampled = torch.zeros(shape, dtype=torch.float32)
    for row, ((ids, completion, positions), rollout) in enumerate(zip(rows, rollouts, strict=True)):
        input_ids[row, : len(ids) + len(completion) - 1] = torch.tensor([*ids, *completion][:-1])
        targets = torch.tensor(positions, dtype=torch.int64) + len(ids) - 1  # the position before each sampled token
        labels[row, targets] = torch.tensor(rollout.tokens)
        sampled[row, targets] = torch.tensor(rollout.log_probs)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": torch.arange(shape[1]).repeat(shape[0], 1),
        "sampled_log_probs": sampled,
    }


def packed_form(rows: Batch) -> Batch:
    """The tokens of all rows one after the other, for ``token_log_probs``: each row up to its last target.

    Args:
        rows: input_ids, labels and position_ids (R, T).

    Returns:
        packed_input_ids, packed_labels and packed_position_ids (1, N); packed_places (N,), the index of each in (R * T,).
        Nothing if little would be left out, or all.
    """
    targets = rows["labels"] != IGNORE_INDEX
    places = targets.flip(1).cumsum(1).flip(1).flatten().nonzero().flatten()
    if not 0 < len(places) <= MOST_PACKED * targets.numel():
        return {}
    packed = {f"packed_{name}": rows[name].flatten()[places][None] for name in ("input_ids", "labels", "position_ids")}
    return {**packed, "packed_places": places}


def logged_of(groups: Sequence[Sequence[Rollout]], rewards: int) -> Batch:
    """What is logged about groups: reward and truncated (R,), rewards (R, F), reward_std (G,).

    Args:
        groups: completions with rewards.
        rewards: number of reward functions.
    """
    rollouts = [rollout for group in groups for rollout in group]
    columns = torch.tensor([rollout.rewards for rollout in rollouts], dtype=torch.float64)
    return {
        "rewards": columns.view(len(rollouts), rewards),
        "reward": torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64),
        "truncated": torch.tensor([float(rollout.truncated) for rollout in rollouts], dtype=torch.float64),
        "reward_std": torch.stack([_std(group) for group in groups]) if groups else torch.zeros(0, dtype=torch.float64),
    }


def _std(group: Sequence[Rollout]) -> Tensor:
    return torch.tensor([rollout.reward for rollout in group], dtype=torch.float64).std()


def without_completions(batch: Batch, rewards: int) -> Batch:
    """A batch of one row without targets, for a rank that runs out of prompts in the last step of an epoch.

    Args:
        batch: of prompts, or from ``training_batch``.
        rewards: number of reward functions.
    """
    row = {name: batch[name][:1] for name in ("input_ids", "labels", "position_ids")}
    blank = torch.zeros_like(row["labels"], dtype=torch.float32)
    return {
        **row,
        **{name: blank for name in ("old_log_probs", "reference_log_probs") if name in batch},
        "labels": torch.full_like(row["labels"], IGNORE_INDEX),
        "sampled_log_probs": blank,
        "advantages": torch.zeros(1),
        **logged_of([], rewards),
        **{name: torch.zeros(0, dtype=torch.float64) for name in _OF_PLACES if name in batch},
    }


def completion_sums(batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    """Sums over completions and groups that are logged, by metric.

    Args:
        batch: from ``training_batch``.
        names: of the reward functions.
    """
    return {
        "rl/reward": batch["reward"].sum(), "rl/length": (batch["labels"] != IGNORE_INDEX).sum(),
        "rl/truncated": batch["truncated"].sum(), "rl/reward_std": batch["reward_std"].sum(),
        "rl/equal_groups": (batch["reward_std"] == 0).sum(), "rl/group_variance": batch["reward_std"].square().sum(),
        "_reward_square": batch["reward"].square().sum(),
        **{f"rl/{name}": batch[name].sum() for name in _OF_PLACES if name in batch},
        **{f"rl/reward/{name}": batch["rewards"][:, at].sum() for at, name in enumerate(names)},
    }  # fmt: skip


def prompts_of(batch: Batch) -> list[tuple[int, list[int]]]:
    """(index, token ids) of each prompt of a batch; none of a batch that only fills up a rank's share."""
    rows = zip(batch["index"].tolist(), batch["lengths"].tolist(), batch["input_ids"].tolist(), strict=True)
    return [(index, ids[:length]) for index, length, ids in rows if index >= 0]
