"""The completions of the last steps as JSON Lines: output_dir/rollouts/step-000012.jsonl; other ranks than 0 have their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bumblebee.distributed import process_group
from bumblebee.rl.rollout import Question, Rollout
from bumblebee.utils.text_files import write_text


def write_rollouts(
    folder: Path,
    step: int,
    keep: int,
    names: Sequence[str],
    rollouts: Sequence[Rollout],
    questions: Sequence[Question],
    advantages: Sequence[float],
) -> None:
    """Write a step's completions of this rank, and delete those of the step that is no longer kept.

    Args:
        folder: is created if needed.
        step: from 1.
        keep: number of steps to keep.
        names: of the reward functions.
        rollouts: with their rewards.
        questions: that each of them answers.
        advantages: of each of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [_line(step, names, *each) for each in zip(rollouts, questions, advantages, strict=True)]
    write_text(_file(folder, step), "".join(lines))
    _file(folder, step - keep).unlink(missing_ok=True)


def _file(folder: Path, step: int) -> Path:
    rank = "" if process_group.is_main() else f"-rank-{process_group.rank()}"
    return folder / f"step-{step:06d}{rank}.jsonl"


def _line(step: int, names: Sequence[str], rollout: Rollout, question: Question, advantage: float) -> str:
    line = {
        "step": step, "place": question.place, "prompt": question.question, "completion": rollout.text,
        "reward": rollout.reward, **dict(zip(names, rollout.rewards, strict=True)),
        "advantage": advantage, "tokens": len(rollout.tokens), "truncated": rollout.truncated,
    }  # fmt: skip
    return json.dumps(line, ensure_ascii=False) + "\n"
