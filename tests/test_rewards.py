"""The shipped reward functions, on answers as models write them."""

from __future__ import annotations

import pytest

from bumblebee.rewards import Brevity, ExactAnswer, Matches, NumericAnswer


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


def test_brevity_falls_linearly_between_its_limits():
    reward = Brevity(free=4, limit=8)
    assert [score(reward, "x" * length) for length in (0, 4, 6, 8, 20)] == [0.0, 0.0, -0.5, -1.0, -1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: score(ExactAnswer(), "a", solution="b"), "the record has no key 'answer'; its keys: 'solution'"),
        (lambda: score(NumericAnswer(), "a", answer="none"), "the record's 'answer' has no number: 'none'"),
        (lambda: Matches("("), r"pattern '\(' is not a regular expression"),
        (lambda: Brevity(8, 4), "free must be at least 0 and less than limit"),
        (lambda: NumericAnswer(tolerance=-1), "tolerance must be at least 0, got -1"),
    ],
)
def test_bad_records_and_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
