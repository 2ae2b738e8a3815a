"""Whole commands in processes of their own: help, launchers, saved recipes, signals, kills and full disks."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.processes import finish, run_command, start, start_command
from helpers.recipe_files import RECIPE, SAMPLES
from helpers.training_runs import weight_bytes, weights

import bumblebee
from bumblebee.training.run_folder import checkpoints


@pytest.fixture(scope="module")
def recipe(tokenizer_folder, tmp_path_factory) -> str:
    """The path of a recipe that every command of these tests begins with."""
    folder = tmp_path_factory.mktemp("recipe")
    text = RECIPE.replace("files: data.jsonl", f"files: {SAMPLES / 'pretrain.jsonl'}").replace("tok\n", f"{tokenizer_folder}\n")
    (folder / "recipe.yaml").write_text(text.replace("every: 1", "every: 2"))
    return str(folder / "recipe.yaml")


def fit(recipe: str, folder: Path, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return run_command("fit", "--config", recipe, "--output_dir", str(folder), *words, **options)


def succeeded(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The line of a command that ended with exit code 2; under a launcher, whatever that adds is left out."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("bumblebee: ")]
    assert len(lines) == 1, done.stderr[-3000:]
    assert "Traceback" not in re.sub(r"(?s)Traceback.*?ChildFailedError.*", "", done.stderr), done.stderr[-5000:]
    return lines[0]


# -- help ----------------------------------------------------------------------------------------------------------------


def imported(*words: str) -> tuple[set[str], float]:
    """The packages that a command imports, and the seconds it takes: the fastest of three times, others use the machine too."""
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        done = finish(start_command(*words, env={"PYTHONPROFILEIMPORTTIME": "1"}))
        seconds.append(time.monotonic() - began)
    assert done.returncode == 0
    return {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}, min(seconds)


def test_help_takes_less_than_a_second_and_imports_no_torch():
    packages, seconds = imported("--help")
    assert "bumblebee" in packages
    assert not packages & {"torch", "deepspeed", "jsonargparse", "numpy"}
    assert seconds < 1


@pytest.mark.parametrize("command", ["fit", "preview", "generate", "chat", "serve"])
def test_the_help_of_a_command_imports_no_torch(command):
    packages, _ = imported(command, "--help")
    assert "jsonargparse" in packages
    assert not packages & {"torch", "deepspeed"}


# -- what a run leaves ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """The folder of a run of six steps, made by the command line with options that differ from the recipe."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = ["--trainer.max_steps", "6", "--trainer.gradient_clip=null", "--callbacks.history", "callbacks.MetricsHistory"]
    succeeded(fit(recipe, folder, *words))
    return folder


def test_a_run_leaves_its_recipe_metrics_checkpoints_and_model(trained):
    assert [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    assert [checkpoint.step for checkpoint in checkpoints(trained)] == [2, 4, 6]
    for folder in (trained, trained / "checkpoint-6"):
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(os.listdir(folder))
    assert not [path for path in trained.rglob("*") if "partial" in path.name]


def test_the_saved_recipe_alone_makes_the_same_weights_to_the_byte_from_any_folder(trained, tmp_path):
    saved = yaml.safe_load((trained / "recipe.yaml").read_text())
    assert saved["trainer"]["gradient_clip"] is None and saved["trainer"]["max_steps"] == 6
    succeeded(run_command("fit", "--config", str(trained / "recipe.yaml"), "--output_dir", "again", cwd=tmp_path))
    assert weight_bytes(tmp_path / "again") == weight_bytes(trained)


@pytest.mark.slow
def test_the_printed_config_alone_makes_the_same_weights_to_the_byte(recipe, trained, tmp_path):
    words = ["--trainer.max_steps", "6", "--trainer.gradient_clip=null", "--print_config"]
    printed = succeeded(fit(recipe, tmp_path / "never", *words))
    assert not (tmp_path / "never").exists()
    (tmp_path / "printed.yaml").write_text(printed.stdout)
    succeeded(run_command("fit", "--config", "printed.yaml", "--output_dir", "again", cwd=tmp_path))
    assert weight_bytes(tmp_path / "again") == weight_bytes(trained)


def test_a_mistake_ends_the_process_with_exit_code_2_and_one_line(recipe, tmp_path):
    done = fit(recipe, tmp_path / "out", "--data.files", "nowhere.jsonl")
    assert done.returncode == 2
    assert done.stderr == "bumblebee: data.files: 'nowhere.jsonl' does not exist\n" and done.stdout == ""
    assert not (tmp_path / "out").exists()


# -- signals and kills ---------------------------------------------------------------------------------------------------


def with_callback(name: str, **options: Any) -> list[str]:
    """The words that add a callback of these tests."""
    words = [f"--callbacks.{name.lower()}", f"helpers.training_runs.{name}"]
    return words + [f"--callbacks.{name.lower()}.{option}={value}" for option, value in options.items()]


SIX = ["--trainer.max_steps", "6", "--trainer.gradient_clip=null"]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_the_process_saves_and_ends_it_with_exit_code_0_and_the_resumed_run_is_byte_identical(
    number, recipe, trained, tmp_path
):
    done = succeeded(fit(recipe, tmp_path / "run", *SIX, *with_callback("SignalIn", step=2, number=int(number))))
    assert "Traceback" not in done.stderr
    assert [(checkpoint.step, checkpoint.last) for checkpoint in checkpoints(tmp_path / "run")] == [(2, False), (3, True)]
    succeeded(fit(recipe, tmp_path / "run", *SIX, "--trainer.resume", "auto"))
    assert weight_bytes(tmp_path / "run") == weight_bytes(trained)


def test_a_kill_in_the_middle_of_a_save_costs_no_more_than_that_save(recipe, trained, tmp_path):
    done = fit(recipe, tmp_path / "run", *SIX, *with_callback("KillInSave", step=4))
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "run").glob(".*partial")] == [".checkpoint-4.partial"]
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path / "run")] == [2]
    succeeded(fit(recipe, tmp_path / "run", *SIX, "--trainer.resume", "auto"))
    assert weight_bytes(tmp_path / "run") == weight_bytes(trained)
    assert not list((tmp_path / "run").glob(".*partial"))


@pytest.mark.slow
def test_kills_at_random_moments_never_leave_anything_that_a_resume_trips_over(recipe, tmp_path):
    """Killed twenty times, in steps and in saves, a run ends with the bytes of one that was not."""
    words = ["--trainer.max_steps", "160", "--callbacks.checkpoint.every", "1", "--callbacks.checkpoint.keep", "2"]
    succeeded(fit(recipe, tmp_path / "whole", *words))
    moments = random.Random(0)
    folder, kills, progress = tmp_path / "run", 0, set()
    while True:
        process = start_command("fit", "--config", recipe, "--output_dir", str(folder), *words, "--trainer.resume", "auto")
        began = {path.name for path in folder.glob("checkpoint-*")}
        while process.poll() is None and {path.name for path in folder.glob("checkpoint-*")} == began:
            time.sleep(0.01)  # until it trains
        time.sleep(moments.uniform(0, 0.6))
        if kills < 20:
            process.kill()
            kills += 1
        done = finish(process)
        progress.add(max((checkpoint.step for checkpoint in checkpoints(folder)), default=0))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert len(progress) > 3
    assert weight_bytes(folder) == weight_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_ctrl_c_twice_ends_the_process_at_once_without_a_traceback(recipe, tmp_path):
    done = fit(recipe, tmp_path / "run", *with_callback("SignalIn", step=1, number=int(signal.SIGINT), times=2))
    assert done.returncode == 128 + signal.SIGINT
    assert "Traceback" not in done.stderr and "interrupt again to stop at once" in done.stderr
    assert not checkpoints(tmp_path / "run")


# -- disks ---------------------------------------------------------------------------------------------------------------


def intact(folder: Path, step: int) -> None:
    """A checkpoint is there that a resume takes, and nothing else that it could take or trip over."""
    assert [checkpoint.step for checkpoint in checkpoints(folder)] == [step]
    assert not list(folder.glob("**/*partial*"))
    assert all(len(tensor) for tensor in weights(folder / f"checkpoint-{step}").values())


def test_a_reader_that_leaves_ends_the_process_without_a_traceback(recipe, tmp_path):
    spoken = ["--callbacks.summary", "callbacks.RunSummary", "--callbacks.log", "callbacks.ProgressBar"]
    run = ["fit", "--config", recipe, "--output_dir", str(tmp_path / "run"), *spoken]
    fit = shlex.join([sys.executable, "-m", "bumblebee", *run])
    words = ["bash", "-c", f"{fit} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(bumblebee.__file__).parents[1])}
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment)
    assert len(done.stdout.splitlines()) == 1
    assert done.returncode == 128 + signal.SIGPIPE, "a traceback would end it with 1"


def test_a_disk_that_fills_up_during_a_checkpoint_is_one_line_and_leaves_the_earlier_one(recipe, trained, tmp_path):
    done = fit(recipe, tmp_path / "run", *SIX, *with_callback("FullDisk", step=3))
    assert done.returncode == 2
    assert re.search("cannot write|File too large", one_line(done))
    intact(tmp_path / "run", 2)
    succeeded(fit(recipe, tmp_path / "run", *SIX, "--trainer.resume", "auto"))
    assert weight_bytes(tmp_path / "run") == weight_bytes(trained)


def test_a_disk_that_is_full_from_the_start_is_one_line(recipe, tmp_path):
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    done = fit(recipe, tmp_path / "run", preexec_fn=limit, env={"BUMBLEBEE_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not list((tmp_path / "cache").glob("tokens/[!.]*"))


def test_a_folder_that_vanishes_during_training_is_one_line(recipe, tmp_path):
    """It is replaced by a file, in which nobody can write a checkpoint; not even root, for whom tests may run."""
    done = fit(recipe, tmp_path / "run", *SIX, *with_callback("ReplaceFolder", step=3))
    assert done.returncode == 2
    assert str(tmp_path / "run") in one_line(done)


# -- two ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "launcher"), [(0, "torchrun"), (3, "deepspeed")])
def test_a_run_of_two_ranks_ends_with_exit_code_0_and_only_rank_0_speaks(stage, launcher, recipe, tmp_path):
    words = ["--trainer.zero_stage", str(stage), "--callbacks.bar", "callbacks.ProgressBar", "--callbacks.bar.interval", "0",
             "--callbacks.summary", "callbacks.RunSummary"]  # fmt: skip
    done = succeeded(fit(recipe, tmp_path / "run", *words, ranks=2, launcher=launcher))
    assert done.stdout.count("step 2/2") == 1
    assert done.stdout.count("Bumblebee 0") == 1
    assert "FutureWarning" not in done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(50))
def test_exit_codes_of_two_ranks_are_0_fifty_times(turn, recipe, tmp_path):
    words = ["--trainer.zero_stage", str(turn % 4), "--callbacks.checkpoint=null"]
    succeeded(fit(recipe, tmp_path / "run", *words, ranks=2))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_a_full_disk_ends_both_ranks_within_a_minute_and_leaves_the_earlier_checkpoint(stage, recipe, tmp_path):
    words = [*SIX, "--trainer.zero_stage", str(stage), *with_callback("FullDisk", step=3)]
    done = fit(recipe, tmp_path / "run", *words, ranks=2, timeout=60)
    assert done.returncode != 0
    assert re.search("cannot write|File too large", one_line(done))
    intact(tmp_path / "run", 2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_disk_that_is_full_for_the_second_rank_only_ends_both(stage, recipe, tmp_path):
    words = [*SIX, "--trainer.zero_stage", str(stage), *with_callback("FullDisk", step=3, rank=1)]
    done = fit(recipe, tmp_path / "run", *words, ranks=2, timeout=60)
    assert done.returncode != 0
    intact(tmp_path / "run", 2)


@pytest.mark.slow
def test_a_mistake_of_two_ranks_is_told_once(recipe, tmp_path):
    for words in (["--data.files", "nowhere.jsonl"], ["--trainer.max_step", "3"], ["--output_dir", "/proc/nowhere/run"]):
        done = fit(recipe, tmp_path / "run", *words, ranks=2, timeout=60)
        assert done.returncode != 0
        one_line(done)
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_in_training_ends_both_ranks_within_a_minute(recipe, tmp_path):
    for rank in (0, 1):
        done = fit(recipe, tmp_path / f"run{rank}", *with_callback("Fail", step=1, rank=rank), ranks=2, timeout=60)
        assert done.returncode != 0
        assert "on fire" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_other_within_a_minute_with_a_message(rank, launcher, recipe, trained, tmp_path):
    words = [*with_callback("KillIn", step=3, rank=rank), *SIX]
    began = time.monotonic()
    done = fit(recipe, tmp_path / "run", *words, ranks=2, launcher=launcher, timeout=120)
    assert time.monotonic() - began < 60 + 30  # the start is not part of the minute
    assert done.returncode != 0
    assert "bumblebee: another rank exited" in done.stderr and "--trainer.resume auto" in done.stderr
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path / "run")] == [2]


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_and_the_resumed_run_is_byte_identical(recipe, tmp_path):
    words = ["--trainer.max_steps", "400", "--callbacks.checkpoint.every", "50"]
    succeeded(fit(recipe, tmp_path / "whole", *words, ranks=2))
    process = start_command("fit", "--config", recipe, "--output_dir", str(tmp_path / "run"), *words, ranks=2)
    while not checkpoints(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on to the ranks
    finish(process, 120)
    assert checkpoints(tmp_path / "run")[-1].last
    succeeded(fit(recipe, tmp_path / "run", *words, "--trainer.resume", "auto", ranks=2))
    assert weight_bytes(tmp_path / "run") == weight_bytes(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_ctrl_c_in_a_terminal_reaches_launcher_and_ranks_and_saves(launcher, recipe, tmp_path):
    words = ["fit", "--config", recipe, "--output_dir", str(tmp_path / "run"), "--trainer.max_steps", "100000"]
    process = start_command(*words, ranks=2, launcher=launcher, start_new_session=True)
    while not checkpoints(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    done = finish(process, 120)
    assert "stopping after this step and saving" in done.stderr
    assert checkpoints(tmp_path / "run")[-1].last


@pytest.mark.slow
def test_two_runs_that_start_together_share_one_token_cache(recipe, tmp_path):
    data = tmp_path / "data.jsonl"
    lines = (SAMPLES / "pretrain.jsonl").read_text().splitlines()
    data.write_text("\n".join(lines * 200))
    environment = {"BUMBLEBEE_CACHE": str(tmp_path / "cache")}
    words = ["fit", "--config", recipe, "--data.files", str(data), "--output_dir"]
    together = [start_command(*words, str(tmp_path / name), env=environment) for name in ("a", "b", "c")]
    for process in together:
        succeeded(finish(process))
    assert len(list((tmp_path / "cache" / "tokens").glob("[!.]*"))) == 1
    assert weight_bytes(tmp_path / "a") == weight_bytes(tmp_path / "b") == weight_bytes(tmp_path / "c")


def test_python_m_takes_the_local_rank_that_a_launcher_puts_before_the_command():
    assert succeeded(run_command("--local_rank=1", "--version")).stdout == f"{bumblebee.__version__}\n"


@pytest.mark.slow
def test_the_installed_program_finds_a_class_in_the_current_folder(recipe, tmp_path):
    program = Path(sys.executable).with_name("bumblebee")
    if not program.exists():
        pytest.skip("bumblebee is not installed as a program")
    (tmp_path / "mine.py").write_text("from bumblebee import Callback\n\n\nclass Mine(Callback):\n    pass\n")
    (tmp_path / "yaml.py").write_text("raise SystemExit('a file here hides an installed module')\n")
    command = ["fit", "--config", recipe, "--callbacks.mine", "mine.Mine", "--print_config"]
    done = finish(start([str(program), *command], cwd=tmp_path))
    assert yaml.safe_load(succeeded(done).stdout)["callbacks"]["mine"]["class_path"] == "mine.Mine"
