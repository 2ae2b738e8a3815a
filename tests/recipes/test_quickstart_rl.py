"""The data and the reward of `make quickstart-rl`, and its commands with a few steps."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import make_sums
import pytest
import show_rewards
import sum_reward

from bumblebee.cli.main import main

ROOT = Path(__file__).parents[2]


def test_held_out_sums_are_not_trained_on() -> None:
    files = make_sums.make_files(42, repeats=2)
    held_out, questions, answered = (
        {record["prompt"] for record in files[name]} for name in ("held_out.jsonl", "questions.jsonl", "answers.jsonl")
    )
    assert len(held_out) == 111 and len(questions) == 600
    assert questions == answered and not held_out & questions
    assert files == make_sums.make_files(42, repeats=2) != make_sums.make_files(43, repeats=2)


def test_teacher_is_right_as_often_as_documented() -> None:
    answers = make_sums.make_files(42, repeats=10)["answers.jsonl"]
    prompts, completions = [each["prompt"] for each in answers], [each["completion"] for each in answers]
    rewards = sum_reward.correct_sum(prompts, completions, [])
    assert sum(rewards) / len(rewards) == pytest.approx(make_sums.OFFSETS[0], abs=0.02)
    assert {len(completion) for completion in completions} == {2}
    assert sum_reward.correct_sum(["47+8", "47+8", "47+8"], ["55", "56", ""], []) == [1.0, 0.0, 0.0]


def commands_of(target: str) -> list[list[str]]:
    """The words of each command of a target that runs a program of the environment."""
    makefile = (ROOT / "Makefile").read_text().replace("$(QUICK_RL)", "runs/quickstart_rl")
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe
    return [found.split() for found in re.findall(r"\$\(BIN\)/(.*)", recipe[1])]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickstart_rl_ends_with_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of the Makefile, with fewer records and steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.setattr(make_sums.make_files, "__defaults__", (1,))
    shorter = {"sft": ["--trainer.max_steps", "3"], "grpo": ["--trainer.max_steps", "2", "--trainer.micro_batch_size", "4"]}
    scripts = {"make_sums": make_sums.main, "show_rewards": show_rewards.main}
    for program, *words in commands_of("quickstart-rl"):
        name = Path(words[0] if program == "python" else words[2]).stem
        capsys.readouterr()
        if program == "python":
            monkeypatch.setattr(sys, "argv", words)
            scripts[name]()
        else:
            main([*words, *shorter.get(name, [])])
    rows = capsys.readouterr().out.split("mean reward")[1].splitlines()[1:]
    labels = [re.sub(r"\s+[\d.]+\s+[\d.]+$", "", row.strip()) for row in rows]
    assert labels == ["greedy: all 111 questions", "55 without a carry", "56 with a carry", "temperature 1, 8 answers to each"]
    assert set(json.loads(Path("runs/quickstart_rl/results.json").read_text())) == {"before GRPO", "after"}
    assert Path("runs/quickstart_rl/grpo/loss.png").stat().st_size
