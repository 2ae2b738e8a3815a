"""Sweeps of stand-ins for training runs: killed, failing, stopped, shared by two workers."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from helpers.fake_sweeps import FAKE_TRIAL, fake_launch

from bumblebee.sweep.errors import SweepError
from bumblebee.sweep.ladder.rungs import resolve
from bumblebee.sweep.ladder.scaling_law import ScalingLaw
from bumblebee.sweep.recipe import SweepRecipe
from bumblebee.sweep.sweep import Sweep
from bumblebee.sweep.sweep_options import SweepOptions
from bumblebee.sweep.trials.devices import environment, slots

pytestmark = pytest.mark.slow


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def kill_trials(folder: Path) -> None:
    """Kill all processes of all trials, like the system when memory runs out."""
    for file in folder.glob("trial-*/.sweep_process"):
        with suppress(ProcessLookupError, ValueError):
            os.killpg(int(file.read_text()), signal.SIGKILL)


def test_ten_kills_lose_no_trial_and_run_none_twice(make_sweep, tmp_path):
    options = {"launch": fake_launch(steps=8, seconds=0.1), "count": 6, "parallel": 2, "resume": True}
    random.seed(0)

    def lines() -> int:
        return sum(len(file.read_text().splitlines()) for name in ("starts", "metrics.jsonl") for file in tmp_path.rglob(name))

    for kill in range(10):
        before = lines()
        worker = multiprocessing.get_context("fork").Process(target=lambda: make_sweep(**options).run())
        worker.start()
        while worker.is_alive() and lines() < before + 1:
            time.sleep(0.01)
        time.sleep(random.random() * 0.3)
        assert worker.is_alive(), "it finished before it was killed"
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        if kill % 2:  # else the trials go on without their sweep
            kill_trials(tmp_path / "sweep")
    sweep = make_sweep(**options)
    assert sweep.run() == "finished"
    trials = sweep.study.trials()
    assert [(trial.number, trial.state) for trial in trials] == [(number, "complete") for number in range(6)]
    assert not list(tmp_path.rglob("collision"))
    for trial in trials:
        folder = sweep.folder / trial.name
        assert [line["step"] for line in lines_of(folder)] == list(range(1, 9))
        assert trial.metric == lines_of(folder)[-1]["validation_loss"]
    assert max(len((sweep.folder / trial.name / "starts").read_text().splitlines()) for trial in trials) > 1
    other = make_sweep(**{**options, "overwrite": True})
    assert [other.study.ask().values for _ in range(6)] == [trial.values for trial in trials]


def test_failed_trials_are_recorded_and_the_sweep_goes_on(make_sweep, tmp_path, capsys):
    sweep = make_sweep(launch=fake_launch(modes={0: "fail", 2: "nan"}))
    assert sweep.run() == "finished"
    trials = sweep.study.trials()
    assert [trial.state for trial in trials] == ["failed", "complete", "failed", "complete"]
    assert trials[0].message == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert trials[2].message == "validation_loss is not finite"
    rows = list(csv.DictReader((sweep.folder / "trials.csv").open()))
    assert [row["state"] for row in rows] == [trial.state for trial in trials]
    assert float(rows[1]["validation_loss"]) == trials[1].metric and float(rows[1]["x"]) == trials[1].values["x"]
    printed = capsys.readouterr().out
    assert "trial-0000 failed: torch.OutOfMemoryError" in printed and "\x1b" not in printed
    assert "4 of 4 trials, best: trial-" in printed


def test_unknown_metric_ends_the_sweep_and_keeps_the_trial(make_sweep):
    silent = fake_launch(modes={0: "silent"})
    text = "method: random\nmetric: {name: lss}\nparameters: {x: {min: 0.0, max: 1.0}}\n"
    with pytest.raises(SweepError, match=r"space.yaml:2: metric.name: trials do not log 'lss' \(did you mean 'loss'\?\)"):
        make_sweep(text, silent, count=1).run()
    sweep = make_sweep(text.replace("lss", "loss"), silent, count=1, resume=True)
    assert sweep.run() == "finished"
    assert sweep.study.trials()[0].state == "complete"
    assert (sweep.folder / "trial-0000" / "starts").read_text() == "start\n"


def test_poor_trials_are_pruned_and_stopped(make_sweep):
    text = "method: grid\nmetric: {name: validation_loss}\nparameters: {x: {values: [0, 1, 2, 3]}}\n"
    sweep = make_sweep(text + "early_terminate: {type: asha, min_iter: 1, eta: 2}\n", fake_launch(8, 0.15), count=None)
    sweep.run()
    states = {trial.values["x"]: trial.state for trial in sweep.study.trials()}
    assert "pruned" in states.values() and sweep.best().values["x"] == 0
    for trial in sweep.study.trials():
        assert (len(lines_of(sweep.folder / trial.name)) < 8) == (trial.state == "pruned")


def test_timeout_stops_trials_which_resume_finishes(make_sweep):
    options = {"launch": fake_launch(12, 0.1), "count": 2, "parallel": 2}
    stopped = make_sweep(**options, timeout=0.6)
    assert stopped.run() == "timeout"
    assert {trial.state for trial in stopped.study.trials()} == {"running"}
    resumed = make_sweep(**options, resume=True)
    assert resumed.run() == "finished"
    assert [[line["step"] for line in lines_of(resumed.folder / trial.name)] for trial in resumed.study.trials()] == [
        list(range(1, 13))
    ] * 2


def test_two_workers_share_one_sqlite_file(make_sweep, tmp_path):
    options = {"launch": fake_launch(2, 0.02), "count": 12, "parallel": 2}
    workers = [make_sweep(**options), make_sweep(**options, resume=True)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trials = workers[0].study.trials()
    assert [(trial.number, trial.state) for trial in trials] == [(number, "complete") for number in range(12)]
    assert len({trial.values["x"] for trial in trials}) == 12
    assert not list(tmp_path.rglob("collision"))
    assert {(workers[0].folder / trial.name / "starts").read_text() for trial in trials} == {"start\n"}


def test_each_trial_has_its_device_and_groups_run_under_torchrun(make_sweep, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert slots([0, 1], None) == [(0,), (1,)] and slots([0, 1], 4) == [(0,), (1,)] * 2 and slots(None, 3) == [()] * 3
    assert environment((1,))["CUDA_VISIBLE_DEVICES"] == "5" and environment((2, 3))["CUDA_VISIBLE_DEVICES"] == "6,7"
    with pytest.raises(SweepError, match="--devices: no device 4"):
        environment((4,))
    seen = {}

    def launch(trial, folder, devices):
        sweep_command = sweep.recipe.command(Path("base.yaml"), trial, folder, devices)
        seen[trial.number] = devices, sweep_command
        return ["/bin/sh", "-c", f"echo $CUDA_VISIBLE_DEVICES; {' '.join(fake_launch()(trial, folder, devices))}"]

    sweep = make_sweep(launch=launch, devices=[[0, 1], [2, 3]], count=2)
    sweep.run()
    printed = {(sweep.folder / f"trial-000{number}" / "output.txt").read_text().strip() for number in (0, 1)}
    assert printed == {"4,5", "6,7"} and {devices for devices, _ in seen.values()} == {(0, 1), (2, 3)}
    command = " ".join(seen[0][1])
    assert "-m torch.distributed.run --standalone --nproc_per_node 2 -m bumblebee fit --config base.yaml --x=" in command
    assert command.endswith(f"--output_dir {sweep.folder / 'trial-0000'} --trainer.resume auto")


def test_killed_trial_is_left_for_resume_and_the_sweep_goes_on(make_sweep, capsys):
    def launch(trial, folder, devices):
        command = fake_launch(3)(trial, folder, devices)
        is_first = trial.number == 0 and not (folder / "starts").exists()
        return ["/bin/sh", "-c", f"{' '.join(command[:-3])} 2 0; rm {folder}/SHA256SUMS; kill -9 $$"] if is_first else command

    sweep = make_sweep(launch=launch, count=2)
    assert sweep.run() == "finished"
    assert [trial.state for trial in sweep.study.trials()] == ["running", "complete"]
    assert "trial-0000 was cut off (killed by signal 9), validation_loss" in capsys.readouterr().out
    resumed = make_sweep(launch=launch, count=2, resume=True)
    assert resumed.run() == "finished"
    assert [trial.state for trial in resumed.study.trials()] == ["complete", "complete"]
    assert [line["step"] for line in lines_of(resumed.folder / "trial-0000")] == [1, 2, 3]


def test_existing_sweep_is_neither_mixed_nor_lost(make_sweep):
    make_sweep(count=1).run()
    with pytest.raises(SweepError, match="already holds this sweep: continue it with --resume, replace it with --overwrite"):
        make_sweep(count=1)
    other = "method: random\nmetric: {name: validation_loss}\nparameters: {x: {min: 0.0, max: 9.0}}\n"
    with pytest.raises(SweepError, match="parameters.x: .* holds another sweep"):
        make_sweep(other, count=1, resume=True)
    assert make_sweep(count=1, resume=True).study.trials()[0].state == "complete"
    assert make_sweep(other, count=1, overwrite=True).study.trials() == []


def test_best_recipe_is_that_of_the_best_trial(make_sweep):
    def launch(trial, folder, devices):
        recipe = {"seed": 1, "output_dir": str(folder), "trainer": {"resume": "auto"}, "optimizer": trial.values["x"]}
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "callbacks": {"wandb": 1, "own": 2}}))
        return fake_launch()(trial, folder, devices)

    sweep = make_sweep(launch=launch, wandb="project")
    sweep.run()
    best = yaml.safe_load((sweep.folder / "best.yaml").read_text())
    lowest = min(sweep.study.trials(), key=lambda trial: trial.metric)
    assert best["optimizer"] == lowest.values["x"] and best["trainer"] == {"resume": None}
    assert best["output_dir"] == str(sweep.folder.parent) and best["callbacks"] == {"own": 2}
    pictures = {"history", "curves", "slices", "parallel_coordinates", "correlation", "importance"}
    assert {file.stem for file in sweep.folder.glob("*.png")} <= pictures and len(list(sweep.folder.glob("*.png"))) >= 5
    words = sweep.recipe.command(Path("base.yaml"), lowest, Path("t"), ())
    assert "--callbacks.wandb.project=project" in words and f"--callbacks.wandb.name={lowest.name}" in words


LADDER = """\
metric: {name: validation_loss}
ladder:
  tokens_per_parameter: 10
  sizes: [{width: 1}, {width: 2}, {width: 4}, {width: 8}]
  predict: [{width: 16}]
"""


def test_size_ladder_predicts_the_next_size(make_sweep, space):
    law = ScalingLaw(2.0, 30.0, 0.25)

    def launch(trial, folder, devices):
        options = trial.values["options"]
        assert options["trainer.max_steps"] == options["width"] * 10
        value = law.loss(options["width"] * 1000, 1) - 1  # the stand-in adds 1
        return [sys.executable, "-S", "-E", str(FAKE_TRIAL), str(folder), repr(value), "1", "0"]

    entry = space(LADDER)
    file, ladder = resolve(entry, entry.ladder, lambda options: (options["width"] * 1000, 1000))
    recipe = SweepRecipe(f"output_dir: {Path(file.path).parent}\nseed: 1\ntrainer: {{}}\n")
    sweep = Sweep(file, recipe, SweepOptions(sweep=file.path), ladder, launch, poll=0.02)
    assert sweep.run() == "finished"
    fitted, (prediction,) = sweep.ladder_report.write()
    assert (fitted.e, fitted.a, fitted.alpha) == pytest.approx((law.e, law.a, law.alpha), rel=1e-3)
    truth = law.loss(16_000, 1)
    assert prediction.loss == pytest.approx(truth, rel=1e-5) and prediction.low <= prediction.loss <= prediction.high
    assert prediction.high - prediction.low < 0.02
    report = json.loads((sweep.folder / "ladder.json").read_text())
    assert [run["tokens"] for run in report["runs"]] == [10_000, 20_000, 40_000, 80_000]
    assert "| 16 k | 160 k | predicted |" in (sweep.folder / "ladder.md").read_text()
    assert (sweep.folder / "ladder.png").stat().st_size > 10_000
