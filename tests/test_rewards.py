"""The shipped reward functions, on answers as models write them."""

from __future__ import annotations

import re
import sys
from typing import get_type_hints

import pytest
import yaml
from helpers import reward_functions
from helpers.processes import ROOT
from jsonargparse import ArgumentParser

from bumblebee import GRPO
from bumblebee.rewards import Brevity, ExactAnswer, InWorkers, Matches, NumericAnswer, RewardInput
from bumblebee.rewards.reward import check_signature, name_of
from bumblebee.rl.scoring import WeightedRewards


def score(reward, text, **record):
    (value,) = reward(["q"], [text], [record])
    return value


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("The answer is 42.", 42, 1.0),
        ("#### 1,234", "They sold 1234", 1.0),
        ("-3.50", "-3.5", 1.0),
        ("42 or 43", 42, 0.0),
        ("no idea", 42, 0.0),
        ("", 42, 0.0),
        ("0.3333333", 1 / 3, 1.0),
        ("5", "so 10 - 5 = 5", 1.0),
    ],
)
def test_numeric_answer_compares_the_last_numbers(text, answer, expected):
    assert score(NumericAnswer(), text, answer=answer) == expected


def test_exact_answer_ignores_surrounding_whitespace_only():
    assert score(ExactAnswer("gold"), " Bern\n", gold="Bern") == 1.0
    assert score(ExactAnswer("gold"), "bern", gold="Bern") == 0.0


def test_pattern_matches_over_lines():
    reward = Matches("^<think>.*</think>")
    assert score(reward, "<think>a\nb</think> c") == 1.0
    assert score(reward, "c <think>a</think>") == 0.0


THOUGHT = "<think>\n7 or 8</think>\n\n<answer>12</answer> <answer>\n 42 </answer>\n"


def test_only_a_passage_of_the_completion_counts():
    within = "<answer>(.*?)</answer>"
    assert score(ExactAnswer(within=within), THOUGHT, answer=42) == 1.0
    assert score(NumericAnswer(within=within), f"{THOUGHT} 43", answer=42) == 1.0
    assert score(NumericAnswer(within="</think>.*"), THOUGHT, answer=42) == 1.0
    assert score(NumericAnswer(within=within), "42", answer=42) == 0.0
    assert score(ExactAnswer(within=within), "42", answer=42) == 0.0


def test_examples_of_the_documentation_are_rewards(monkeypatch):
    """And those of thinking and answers in tags score what they say."""
    monkeypatch.setitem(sys.modules, "my_rewards", reward_functions)
    monkeypatch.setattr(reward_functions, "passes_tests", reward_functions.lengths, raising=False)
    monkeypatch.setattr(reward_functions, "one_number", reward_functions.lengths, raising=False)
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "rl.md").read_text(encoding="utf-8"), re.DOTALL)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rewards", type=get_type_hints(GRPO.__init__)["rewards"])
    listed = [
        item for block in map(yaml.safe_load, blocks)
        for item in (block.get("task", {}).get("init_args") or block).get("rewards", []) if "RewardModel" not in str(item)
    ]  # fmt: skip
    rewards = parser.instantiate_classes(parser.parse_object({"rewards": listed})).rewards
    names = [name_of(reward) for reward in rewards]
    assert {"NumericAnswer", "Matches", "Judge", "lengths"} <= set(names)
    form = names.index("Matches")
    assert [score(reward, THOUGHT, answer=42) for reward in rewards[form - 1 : form + 1]] == [1.0, 1.0]
    assert score(rewards[form], f"{THOUGHT} 43", answer=42) == 0.0


def test_brevity_falls_linearly_between_its_limits():
    reward = Brevity(free=4, limit=8)
    assert [score(reward, "x" * length) for length in (0, 4, 6, 8, 20)] == [0.0, 0.0, -0.5, -1.0, -1.0]
    in_tokens = Brevity(free=4, limit=8, unit="tokens")
    assert in_tokens.score([RewardInput("q", "x" * 20, {}, tokens) for tokens in (4, 6, 9)]) == [0.0, -0.5, -1.0]
    with pytest.raises(ValueError, match="unit tokens needs the number of tokens"):
        score(in_tokens, "x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: score(ExactAnswer(), "a", solution="b"), "the record has no key 'answer'; its keys: 'solution'"),
        (lambda: score(NumericAnswer(), "a", answer="none"), "the record's 'answer' has no number: 'none'"),
        (lambda: ExactAnswer(within="("), r"within '\(' is not a regular expression"),
        (lambda: ExactAnswer(within="(a)(b)"), r"within '\(a\)\(b\)' has 2 groups, expected at most 1"),
        (lambda: Matches("("), r"pattern '\(' is not a regular expression"),
        (lambda: Brevity(8, 4), "free must be at least 0 and less than limit"),
        (lambda: NumericAnswer(tolerance=-1), "tolerance must be at least 0, got -1"),
    ],
)
def test_bad_records_and_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def of_completions(completions, **kwargs):
    return [1.0] * len(completions)


def of_columns(prompts, completions, answer, **kwargs):
    return [1.0] * len(completions)


@pytest.mark.parametrize("wrap", [lambda reward: reward, InWorkers])
@pytest.mark.parametrize("reward", [of_completions, of_columns])
def test_rewards_with_parameters_of_trl_are_refused(reward, wrap):
    message = rf"task.rewards: {reward.__name__}: a reward is called with \(prompts, completions, records\), but .*\*\*kwargs\)"
    with pytest.raises(ValueError, match=message):
        WeightedRewards([wrap(reward)], None).check()


@pytest.mark.parametrize(
    "reward", [lambda *lists: [], lambda p, c, r: [], lambda p, c, records, **more: [], max, ExactAnswer()]
)
def test_other_ways_to_take_three_lists_are_accepted(reward):
    check_signature(reward)
