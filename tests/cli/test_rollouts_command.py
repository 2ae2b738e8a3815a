"""``bumblebee rollouts``: pages through the completions of a run, and writes pass rates that ``datamodules.Prompts`` reads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from bumblebee.cli.main import main
from bumblebee.rl.rollout import Rollout
from bumblebee.rl.rollout_files import ScoredRollout, write_rollouts
from datamodules import Prompts

REWARDS = {2: [[1.0, 0.0], [0.0, 0.0]], 3: [[1.0, 1.0], [0.0, 0.5]]}  # by step: of each group


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Steps 2 and 3 of a run with two prompts of three, in the current folder."""
    monkeypatch.chdir(tmp_path)
    lines = [{"prompt": f"{number} + 1?", "answer": number + 1} for number in range(3)]
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for step, groups in REWARDS.items():
        scored = []
        for at, group in enumerate(groups):
            question = SimpleNamespace(index=at, question=f"{at} + 1?", place=f"questions.jsonl:{at + 1}")
            for reward in group:
                text = f"step {step}\x1b[2J says {reward}"
                scored.append(ScoredRollout(Rollout(at, [1, 2], text=text, rewards=[reward], reward=2 * reward), question, 0.5))
        write_rollouts(Path("runs/grpo/rollouts"), step, 5, ["Exact"], scored)
    return "runs/grpo"


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(["rollouts", *words])
    return capsys.readouterr().out


def shown(text: str) -> list[str]:
    """Step and reward of each entry."""
    return [
        line.split("  ")[1].removeprefix("step ") + ": " + line.split()[4] for line in text.splitlines() if "advantage" in line
    ]


def test_best_and_worst_of_the_last_step_come_first(run, capsys):
    text = printed(capsys, run, "--count", "3")
    assert text.startswith("step 3: 4 completions of 2 prompts, reward 1.25 ± 0.8292, 0% truncated\n")
    assert (
        "1  step 3  reward 2 (Exact 1)  advantage +0.5  2 tokens  questions.jsonl:1\n   ? 0 + 1?\n   → step 3·[2J says 1.0\n"
        in text
    )
    assert shown(text) == ["3: 2", "3: 0", "3: 2"] and text.endswith("page 1 of 2; more: --page 2\n")
    assert shown(printed(capsys, run, "--count", "3", "--page", "2")) == ["3: 1"]


def test_order_and_steps_are_options(run, capsys):
    assert shown(printed(capsys, run, "--order", "worst")) == ["3: 0", "3: 1", "3: 2", "3: 2"]
    assert shown(printed(capsys, run, "--order", "sampled", "--step", "2")) == ["2: 2", "2: 0", "2: 0", "2: 0"]
    text = printed(capsys, f"{run}/rollouts", "--step", "all", "--order", "best", "--count", "3")
    assert "steps 2 to 3: 8 completions" in text and shown(text) == ["2: 2", "3: 2", "3: 2"]


def test_prompts_are_selected_by_the_pass_rates_of_a_run(run, capsys, tokenizer_folder):
    text = printed(capsys, run, "--pass_rates", "rated.jsonl", "--reward", "Exact", "--solved", "1")
    assert text == "rated.jsonl: 2 prompts rated (1 never solved, 0 always), 1 without completions\n"
    assert [json.loads(line).get("pass_rate") for line in Path("rated.jsonl").read_text().splitlines()] == [0.75, 0.0, None]
    data = Prompts("rated.jsonl", str(tokenizer_folder), pass_rate_key="pass_rate", min_pass_rate=0.1, max_pass_rate=0.9)
    data.setup(0)
    assert [sample.question for sample in data.train] == ["0 + 1?", "2 + 1?"] and len(data.lengths) == 2
    assert data.origin(1) == "rated.jsonl:3"
    summary = data.summary()
    assert (summary["pass rate below 0.1"], summary["pass rate above 0.9"]) == ("1 left out", "0 left out")
    assert summary["without a pass rate"] == "1 kept"
    printed(capsys, run, "--pass_rates", "sums.jsonl")  # 2 for a solved one, and 1 for half
    assert [json.loads(line).get("pass_rate") for line in Path("sums.jsonl").read_text().splitlines()] == [0.75, 0.25, None]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["."], "run: . has no rollouts: no step-*.jsonl of a GRPO run with task.keep_rollouts above 0"),
        (["runs/grpo", "--step", "7"], "step: runs/grpo/rollouts has the steps 2 to 3, not 7"),
        (["runs/grpo", "--page", "2"], "page: 2 is after the last of 1 page of 6 completions"),
        (
            ["runs/grpo", "--pass_rates", "a.jsonl", "--reward", "Exat"],
            "reward: no reward is named 'Exat' (did you mean 'Exact'?)",
        ),
        (["runs/grpo", "--pass_rates", "questions.jsonl"], "pass_rates: questions.jsonl must be a new .jsonl file"),
        (["damaged"], "damaged/step-000001.jsonl:1: not a completion of a GRPO run"),
    ],
)
def test_errors_are_one_line(words, message, run, capsys):
    Path("damaged").mkdir()
    Path("damaged/step-000001.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(SystemExit) as done:
        main(["rollouts", *words])
    assert done.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        ({}, {"pass_rate_key": "rate"}, "pass_rate_key: no record has the key 'rate'"),
        ({"rate": "high"}, {"pass_rate_key": "rate"}, "q.jsonl:1: 'rate' must be a number from 0 to 1, not a string"),
        ({"rate": 75}, {"pass_rate_key": "rate"}, "q.jsonl:1: 'rate' must be from 0 to 1, got 75"),
        ({"rate": 0.0}, {"pass_rate_key": "rate", "min_pass_rate": 0.1}, r"none of 1 prompts is in \[0.1, 1.0\]"),
        ({}, {"max_pass_rate": 0.9}, "min_pass_rate and max_pass_rate need pass_rate_key"),
        ({}, {"pass_rate_key": "rate", "min_pass_rate": 0.9, "max_pass_rate": 0.1}, "must be in"),
    ],
)
def test_unusable_pass_rates_are_refused(record, options, message, tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("q.jsonl").write_text(json.dumps({"prompt": "1 + 1?", **record}))
    with pytest.raises(ValueError, match=message):
        Prompts("q.jsonl", str(tokenizer_folder), **options).setup(0)
