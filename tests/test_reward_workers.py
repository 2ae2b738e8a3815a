"""InWorkers: the same values as in-process, and completions that hang, kill their worker or raise."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.processes import ROOT
from helpers.reward_functions import by_name, hangs_with_a_child, lengths

from bumblebee.rewards import Brevity, ExactAnswer, InWorkers, MathAnswer, NumericAnswer, RewardError, RewardInput
from bumblebee.rewards.reward import CompletionError, Failure, InputReward, score_all
from bumblebee.rl.reward_failures import RewardFailures
from bumblebee.rl.rollout import Rollout
from bumblebee.rl.scoring import WeightedRewards

TEXTS = ["It is 42.", "42", "", "forty", "no\n42"]
INPUTS = [RewardInput(f"{i}?", text, {"answer": 42}, 3 * i) for i, text in enumerate(TEXTS)]


@dataclass
class Asked:
    place: str
    record: dict[str, Any] = field(default_factory=dict)
    question: str = "?"
    index: int = 0
    ids: list[int] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None


def scored(reward: InWorkers, texts: list[str], weights: WeightedRewards | None = None) -> list[float]:
    """Rewards of texts, whose prompts are from q.jsonl:1, q.jsonl:2, ..."""
    rollouts = [Rollout(index, text=text) for index, text in enumerate(texts)]
    (weights or WeightedRewards([reward], None)).score(rollouts, [Asked(f"q.jsonl:{at + 1}") for at in range(len(texts))])
    return [rollout.reward for rollout in rollouts]


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.parametrize("reward", [lengths, ExactAnswer(), NumericAnswer(), Brevity(2, 9, unit="tokens")])
def test_values_are_those_of_the_reward_in_process(reward):
    workers = InWorkers(reward, processes=2, timeout=60)
    assert workers.score(INPUTS) == score_all(reward, INPUTS)
    assert workers.score(INPUTS[:1]) == score_all(reward, INPUTS[:1])


@pytest.mark.slow
def test_each_failure_costs_its_own_completion_only(caplog):
    reward = InWorkers(by_name, processes=2, timeout=2.0, on_timeout=-1.0, on_error=-2.0)
    weighted = WeightedRewards([reward], None)
    texts = ["a", "regex", "b", "exit", "kill", "c", "raise", "quit", "d"]
    with caplog.at_level(logging.WARNING):
        assert scored(reward, texts, weighted) == [0.5, -1.0, 0.5, -2.0, -2.0, 0.5, -2.0, -2.0, 0.5]
    assert weighted.failures.take() == {"rl/reward_timeouts": 1, "rl/reward_errors": 4}
    timeout, error = (record.getMessage() for record in caplog.records)
    assert timeout == "task.rewards: by_name timed out after 2 s on a completion of q.jsonl:2; it counts as -1"
    assert error == (
        "task.rewards: by_name ended its worker process on a completion of q.jsonl:4: exit code 7; it counts as -2;"
        " so did 3 more of this run"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("raise", {}, r"by_name failed on a completion of q.jsonl:2: KeyError\('absent'\) \(.*reward_functions.py:\d+\)"),
        ("kill", {}, "by_name ended its worker process on a completion of q.jsonl:2: signal 9, Killed; a common reason is"),
        ("sleep", {"timeout": 0.5, "on_timeout": "stop"}, "by_name timed out after 0.5 s on a completion of q.jsonl:2"),
        ("none", {"on_error": 0.0}, "by_name returned None for a completion of q.jsonl:2"),
    ],
)
def test_a_run_that_stops_names_the_record(text, options, message):
    with pytest.raises(RewardError, match=f"^task.rewards: {message}"):
        scored(InWorkers(by_name, **{"processes": 1, "timeout": 60, **options}), ["a", text, "sleep"])


@pytest.mark.slow
def test_a_timeout_kills_child_processes_too(tmp_path):
    reward = InWorkers(hangs_with_a_child, timeout=2.0)
    (failure,) = reward.score([RewardInput("", "", {"file": str(tmp_path / "pids")})])
    assert isinstance(failure, Failure) and failure.timed_out
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    wait_until(lambda: all(gone(pid) for pid in pids))


@pytest.mark.slow
def test_workers_end_with_a_killed_trainer(tmp_path):
    """Also one that hangs in C code, where no Python runs, and its child process."""
    script = (
        "from bumblebee.rewards import InWorkers, RewardInput\n"
        "from helpers.reward_functions import hangs_with_a_child\n"
        f"InWorkers(hangs_with_a_child, timeout=100).score([RewardInput('', '', {{'file': {str(tmp_path / 'pids')!r}}})])\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    trainer = subprocess.Popen([sys.executable, "-c", script], env=env)
    wait_until(lambda: (tmp_path / "pids").is_file() and (tmp_path / "pids").read_text().endswith("\n"))
    trainer.kill()
    trainer.wait()
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    wait_until(lambda: all(gone(pid) for pid in pids))


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_reward_that_workers_cannot_import_is_named(tmp_path, monkeypatch):
    Path(tmp_path, "vanishing_reward.py").write_text("def f(prompts, completions, records): return [1.0]\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = InWorkers(__import__("vanishing_reward").f)
    Path(tmp_path, "vanishing_reward.py").unlink()
    message = "task.rewards: f cannot be loaded in a worker process: ModuleNotFoundError"
    with pytest.raises(RewardError, match=message):
        scored(reward, ["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, "processes must be at least 1, got 0"),
        ({"timeout": 0}, "timeout must be positive, got 0"),
        ({"on_timeout": float("nan")}, 'on_timeout must be a finite number or "stop", got nan'),
        ({"reward": lambda prompts, completions, records: [1.0]}, "reward: <lambda> cannot be sent to worker processes"),
    ],
)
def test_workers_refuse_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        InWorkers(**{"reward": lengths, **options})


def test_warnings_become_rarer(caplog):
    failures = RewardFailures()
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            failures.add("slow", [("q.jsonl:1", Failure(0.0, "timed out on", timed_out=True))])
    assert len(caplog.records) == 7
    assert "so did 63 more of this run" in caplog.records[-1].getMessage()
    assert failures.take() == {"rl/reward_timeouts": 100, "rl/reward_errors": 0}
    assert failures.take() == {"rl/reward_timeouts": 0, "rl/reward_errors": 0}


MATHEMATICS = [
    ("1/2", r"It is \boxed{\frac{2}{4}}.", 1.0),
    ("1/2", "so 50%", 1.0),
    (0.5, r"$\frac12$", 1.0),
    (r"\{1, 2\}", r"\boxed{\{2, 1\}}", 1.0),
    (r"$2\sqrt{3}$", r"\boxed{\sqrt{12}}", 1.0),
    ("x+1", "$1 + x$", 1.0),
    ("1,234", "The answer is 1234.", 1.0),
    ("(0, 1]", r"\boxed{(0, 1)}", 0.0),
    ("42", "no idea", 0.0),
    ("42", "", 0.0),
]


@pytest.mark.slow
def test_mathematics_is_compared_in_process_in_threads_and_in_workers():
    pytest.importorskip("math_verify")
    inputs = [RewardInput("?", text, {"answer": answer}) for answer, text, _ in MATHEMATICS]
    expected = [value for _, _, value in MATHEMATICS]
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(MathAnswer(processes=0).score, inputs).result() == expected
    tower = RewardInput("?", r"\boxed{9^{9^{9^{9^9}}}}", {"answer": 3})
    workers = MathAnswer(processes=1, timeout=20.0, within="<answer>(.*?)</answer>")
    tagged = [replace(each, completion=f"$7$ <answer>{each.completion}</answer>") for each in inputs]
    assert workers.score([inputs[0], *tagged]) == [0.0, *expected]
    assert [getattr(each, "timed_out", each) for each in MathAnswer(processes=1, timeout=3.0).score([tower])] == [True]
    with pytest.raises(CompletionError, match="failed on a completion: .*the record has no key 'answer'"):
        workers.score([RewardInput("?", "1", {"gold": 1})])


def test_mathematics_needs_its_package(monkeypatch):
    monkeypatch.setattr("bumblebee.rewards.math_answer.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"task.rewards: MathAnswer needs math-verify: pip install bumblebee\[math\]"):
        MathAnswer()


class MeetsAnother(InputReward):
    """Waits until another one is scoring at the same time."""

    can_fail = waits = True

    def __init__(self, barrier: threading.Barrier, name: str, value: float) -> None:
        self.barrier, self.__name__, self.value = barrier, name, value

    def score(self, inputs):
        self.barrier.wait(10)
        return [Failure(self.value, "failed on", "no score", False), *[self.value] * (len(inputs) - 1)]


def test_rewards_that_wait_run_at_the_same_time_in_order(caplog):
    barrier = threading.Barrier(2)
    rewards = [MeetsAnother(barrier, "slow", 1.0), lambda prompts, texts, records: [2.0] * len(texts)]
    weighted = WeightedRewards([*rewards, MeetsAnother(barrier, "slower", 3.0)], None)
    rollouts = [Rollout(index, text="x") for index in range(2)]
    weighted.score(rollouts, [Asked("q.jsonl:1"), Asked("q.jsonl:2")])
    assert [each.rewards for each in rollouts] == [[1.0, 2.0, 3.0]] * 2
    assert weighted.failures.counts == {"errors": 2}
    assert [record.getMessage().split()[1] for record in caplog.records] == ["slow", "slower"]
