"""Print the mean reward on held-out questions before and after GRPO, and some answers.

    python recipes/quickstart_rl/show_rewards.py --runs runs/quickstart_rl

Both models answer every question of held_out.jsonl, greedily and by several samples at temperature 1. Questions with a carry
(47+8, but not 41+8) are listed separately, since they are harder. Saves the table in RUNS/results.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sum_reward import correct_sum

from bumblebee import Generator, SamplingParams

SAMPLES = 8  # of each question, at temperature 1
SHOWN = 6
MAX_NEW_TOKENS = 4
STAGES = {"before GRPO": "sft", "after": "grpo"}


@dataclass(frozen=True)
class Answers:
    """A model's answers to all questions: greedy ones, and ``SAMPLES`` sampled ones of each question."""

    greedy: list[str]
    sampled: list[str]


def answers_of(folder: Path, questions: Sequence[str]) -> Answers:
    generator = Generator.from_pretrained(folder, device="cpu", dtype="float32")
    prompts = [generator.encode_chat(question) for question in questions]
    greedy = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, temperature=0.0)
    repeated = [ids for ids in prompts for _ in range(SAMPLES)]
    samples = [SamplingParams(max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, seed=seed) for seed in range(len(repeated))]
    return Answers(
        [completion.text for completion in generator.generate(prompts, greedy)],
        [completion.text for completion in generator.generate(repeated, samples)],
    )


def has_carry(question: str) -> bool:
    a, b = question.split("+")
    return int(a) % 10 + int(b) % 10 >= 10


def mean_rewards(questions: Sequence[str], answers: Answers) -> dict[str, float]:
    """Mean reward by row of the table."""
    rewards = dict(zip(questions, correct_sum([*questions], answers.greedy, []), strict=True))
    sampled = correct_sum([question for question in questions for _ in range(SAMPLES)], answers.sampled, [])
    carry = [reward for question, reward in rewards.items() if has_carry(question)]
    no_carry = [reward for question, reward in rewards.items() if not has_carry(question)]
    return {
        f"greedy: all {len(rewards)} questions": mean([*rewards.values()]),
        f"  {len(no_carry)} without a carry": mean(no_carry),
        f"  {len(carry)} with a carry": mean(carry),
        f"temperature 1, {SAMPLES} answers to each": mean(sampled),
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print rewards and answers before and after GRPO.", allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=Path("runs/quickstart_rl"), help="folder of the data and both runs")
    runs = parser.parse_args().runs
    lines = (runs / "data" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["prompt"] for line in lines]
    answers = {stage: answers_of(runs / folder, questions) for stage, folder in STAGES.items()}
    table = {stage: mean_rewards(questions, each) for stage, each in answers.items()}
    (runs / "results.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    print(f"{'answers to held-out questions':<34}" + "".join(f"{stage:>14}" for stage in STAGES))
    for number, question in enumerate(questions[:SHOWN]):
        print(f"  {question + ' =':<32}" + "".join(f"{each.greedy[number]:>14}" for each in answers.values()))
    print(f"\n{'mean reward':<34}" + "".join(f"{stage:>14}" for stage in STAGES))
    for row in next(iter(table.values())):
        print(f"  {row:<32}" + "".join(f"{rewards[row]:>14.3f}" for rewards in table.values()))


if __name__ == "__main__":
    main()
