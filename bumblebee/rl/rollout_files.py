"""The completions of the last steps as JSON Lines: output_dir/rollouts/step-000012.jsonl; other ranks than 0 have their own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bumblebee.distributed import process_group
from bumblebee.rl.rollout import Question, Rollout
from bumblebee.rl.sampled_text import SampledText
from bumblebee.utils.text_files import write_text


@dataclass(frozen=True)
class ScoredRollout:
    """A completion that a step trains on.

    Args:
        rollout: with its rewards.
        question: that it answers.
        advantage: of the completion.
    """

    rollout: Rollout
    question: Question
    advantage: float


def write_rollouts(folder: Path, step: int, keep: int, names: Sequence[str], rollouts: Iterable[ScoredRollout]) -> None:
    """Write a step's completions of this rank, and delete those of steps that are no longer kept.

    Args:
        folder: is created if needed.
        step: from 1.
        keep: number of steps to keep, with those that have no completions of their own.
        names: of the reward functions.
        rollouts: of the step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(_file(folder, step), "".join(_line(step, names, each) for each in rollouts))
    for file in folder.glob("step-*.jsonl"):
        written = file.stem.split("-")[1]
        if written.isdecimal() and int(written) <= step - keep and file == _file(folder, int(written)):
            file.unlink()


def best_and_worst(rollouts: Sequence[ScoredRollout], names: Sequence[str]) -> list[SampledText]:
    """The completions of all ranks with the highest and the lowest reward; of equal ones the first. Collective.

    Args:
        rollouts: of this rank.
        names: of the reward functions.
    """
    own = sorted(rollouts, key=lambda each: -each.rollout.reward)
    everyone = process_group.all_gather_items([_sampled(each, names) for each in (own if len(own) < 2 else (own[0], own[-1]))])
    if not everyone:
        return []
    best, worst = (pick(everyone, key=lambda each: each.reward or 0.0) for pick in (max, min))
    return [replace(best, title="best"), replace(worst, title="worst")]


def _sampled(scored: ScoredRollout, names: Sequence[str]) -> SampledText:
    rollout = scored.rollout
    rewards: Mapping[str, float] = dict(zip(names, rollout.rewards, strict=True))
    return SampledText(scored.question.question, rollout.text, reward=rollout.reward, rewards=rewards)


def _file(folder: Path, step: int) -> Path:
    rank = "" if process_group.is_main() else f"-rank-{process_group.rank()}"
    return folder / f"step-{step:06d}{rank}.jsonl"


def _line(step: int, names: Sequence[str], scored: ScoredRollout) -> str:
    rollout, question = scored.rollout, scored.question
    line = {
        "step": step, "place": question.place, "prompt": question.question, "completion": rollout.text,
        "reward": rollout.reward, **dict(zip(names, rollout.rewards, strict=True)),
        "advantage": scored.advantage, "tokens": len(rollout.tokens), "truncated": rollout.truncated,
        **({"turns": rollout.turns} if rollout.turns else {}),
    }  # fmt: skip
    return json.dumps(line, ensure_ascii=False) + "\n"
