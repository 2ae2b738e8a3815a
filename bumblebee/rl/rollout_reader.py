"""Reading the completions that a run has written to output_dir/rollouts, see ``rollout_files.py``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bumblebee.utils.formatting import hint

Order = Literal["extremes", "best", "worst", "sampled"]
Steps = int | Literal["last", "all"]
_FIELDS = {"step": int, "place": str, "prompt": str, "completion": str, "reward": float, "advantage": float, "tokens": int}
_FILE = re.compile(r"step-(\d+)(-rank-\d+)?\.jsonl")


@dataclass(frozen=True)
class LoggedRollout:
    """A completion in a file.

    Args:
        step: that trained on it, from 1.
        place: FILE:LINE of its record.
        prompt: text of the question.
        completion: without special tokens.
        reward: weighted sum of the rewards.
        rewards: of each reward function, by name.
        advantage: of the completion.
        tokens: number of tokens.
        truncated: whether it was cut.
    """

    step: int
    place: str
    prompt: str
    completion: str
    reward: float
    rewards: Mapping[str, float]
    advantage: float
    tokens: int
    truncated: bool


def read_rollouts(run: str | Path, steps: Steps = "last") -> list[LoggedRollout]:
    """Read a run's completions, in the order of steps and, in a step, of ranks and groups.

    Args:
        run: output folder of a run, or its rollouts folder.
        steps: a step, the last one, or all that the run has kept.

    Raises:
        ValueError: there are none, or a line is damaged.
    """
    folder = Path(run) / "rollouts" if (Path(run) / "rollouts").is_dir() else Path(run)
    files = sorted(path for path in folder.glob("step-*.jsonl") if _FILE.fullmatch(path.name))
    if not files:
        raise ValueError(f"{run} has no rollouts: no step-*.jsonl of a GRPO run with task.keep_rollouts above 0")
    known = sorted({_step_of(path) for path in files})
    chosen = known[-1:] if steps == "last" else known if steps == "all" else [steps]
    if not set(chosen) <= set(known):
        raise ValueError(f"step: {folder} has the steps {known[0]} to {known[-1]}, not {steps}")
    return [each for path in files if _step_of(path) in chosen for each in _read(path)]


def _step_of(path: Path) -> int:
    return int(path.name.split("-")[1].removesuffix(".jsonl"))


def _read(path: Path) -> Iterable[LoggedRollout]:
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            values = {name: kind(line[name]) for name, kind in _FIELDS.items()}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number}: not a completion of a GRPO run: {error!r}") from None
        others = line.keys() - _FIELDS.keys() - {"truncated"}
        rewards = {name: float(line[name]) for name in line if name in others and type(line[name]) in (int, float)}
        yield LoggedRollout(**values, rewards=rewards, truncated=bool(line.get("truncated")))


def ordered(rollouts: Sequence[LoggedRollout], order: Order) -> list[LoggedRollout]:
    """By falling or rising reward; extremes alternate between both, and do not repeat one."""
    if order == "sampled":
        return list(rollouts)
    best = sorted(rollouts, key=lambda each: -each.reward)
    if order != "extremes":
        return best if order == "best" else best[::-1]
    half = math.ceil(len(best) / 2)
    pairs = zip(best[:half], [*best[half:][::-1], None], strict=False)
    return [each for pair in pairs for each in pair if each is not None]


def pass_rates(rollouts: Iterable[LoggedRollout], reward: str | None = None, solved: float = 1.0) -> dict[str, float]:
    """Share of each record's completions that solve it, by its place.

    Args:
        rollouts: of all steps.
        reward: name of a reward function; None for the weighted sum.
        solved: reward from which on a completion counts.

    Raises:
        ValueError: there is no such reward.
    """
    passed: dict[str, list[bool]] = {}
    for each in rollouts:
        if reward is not None and reward not in each.rewards:
            known = list(each.rewards)
            raise ValueError(f"reward: no reward is named {reward!r}{hint(reward, known)}; there are {', '.join(known)}")
        value = each.reward if reward is None else each.rewards[reward]
        passed.setdefault(each.place, []).append(value >= solved)
    return {place: sum(values) / len(values) for place, values in passed.items()}
