"""Whole commands as subprocesses: help, launchers, saved recipes, signals, kills and full disks."""

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
from bumblebee.checkpoint.trainer_state import checkpoints
from bumblebee.cli.commands import COMMANDS


@pytest.fixture(scope="module")
def recipe(tokenizer_folder, tmp_path_factory) -> str:
    """The path of the recipe used by all commands of these tests."""
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
    """Return the error line of a command that ended with exit code 2, ignoring the output of a launcher."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("bumblebee: ")]
    assert len(lines) == 1, done.stderr[-3000:]
    assert "Traceback" not in re.sub(r"(?s)Traceback.*?ChildFailedError.*", "", done.stderr), done.stderr[-5000:]
    return lines[0]


# -- help ----------------------------------------------------------------------------------------------------------------


def imported(*words: str) -> tuple[set[str], float]:
    """Return the packages that a command imports, and the seconds of CPU time that it takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = finish(start_command(*words, env={"PYTHONPROFILEIMPORTTIME": "1"}))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    packages = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    return packages, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_is_fast_and_imports_no_large_package():
    packages, seconds = imported("--help")
    assert "bumblebee" in packages
    assert not packages & {"torch", "deepspeed", "jsonargparse", "numpy", "yaml", "callbacks", "datamodules", "serve"}
    assert seconds < 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_imports_no_torch(command):
    packages, _ = imported(command, "--help")
    assert "jsonargparse" in packages
    assert not packages & {"torch", "deepspeed", "transformers"}


LOGGING_CALLBACK = """
import logging

from bumblebee import Callback


class Mine(Callback):
    def on_fit_start(self, trainer):
        for level in ("debug", "info"):
            getattr(logging.getLogger("bumblebee.mine"), level)(f"a message of level {level}")
"""


@pytest.mark.slow
def test_log_level_debug_shows_debug_messages(recipe, tmp_path):
    (tmp_path / "mine.py").write_text(LOGGING_CALLBACK)
    words = ["--trainer.max_steps", "1", "--callbacks.mine", "mine.Mine", "--log_level", "debug"]
    lines = succeeded(fit(recipe, tmp_path / "run", *words, cwd=tmp_path)).stderr.splitlines()
    assert {"debug: a message of level debug", "a message of level info"} <= set(lines)


# -- the files of a run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """The folder of a run of six steps with options that differ from the recipe."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = ["--trainer.max_steps", "6", "--trainer.gradient_clip=null", "--callbacks.history", "callbacks.MetricsHistory"]
    succeeded(fit(recipe, folder, *words))
    return folder


def test_run_writes_recipe_metrics_checkpoints_and_model(trained):
    assert [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    assert [checkpoint.step for checkpoint in checkpoints(trained)] == [2, 4, 6]
    for folder in (trained, trained / "checkpoint-6"):
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(os.listdir(folder))
    assert not [path for path in trained.rglob("*") if "partial" in path.name]


@pytest.mark.slow
def test_saved_recipe_reproduces_the_weights(trained, tmp_path):
    saved = yaml.safe_load((trained / "recipe.yaml").read_text())
    assert saved["trainer"]["gradient_clip"] is None and saved["trainer"]["max_steps"] == 6
    succeeded(run_command("fit", "--config", str(trained / "recipe.yaml"), "--output_dir", "again", cwd=tmp_path))
    assert weight_bytes(tmp_path / "again") == weight_bytes(trained)


@pytest.mark.slow
def test_printed_config_reproduces_the_weights(recipe, trained, tmp_path):
    words = ["--trainer.max_steps", "6", "--trainer.gradient_clip=null", "--print_config"]
    printed = succeeded(fit(recipe, tmp_path / "never", *words))
    assert not (tmp_path / "never").exists()
    (tmp_path / "printed.yaml").write_text(printed.stdout)
    succeeded(run_command("fit", "--config", "printed.yaml", "--output_dir", "again", cwd=tmp_path))
    assert weight_bytes(tmp_path / "again") == weight_bytes(trained)


def test_user_error_is_exit_code_2_and_one_line(recipe, tmp_path):
    done = fit(recipe, tmp_path / "out", "--data.files", "nowhere.jsonl")
    assert done.returncode == 2
    assert done.stderr == "bumblebee: data.files: file not found: nowhere.jsonl\n" and done.stdout == ""
    assert not (tmp_path / "out").exists()


# -- signals and kills ---------------------------------------------------------------------------------------------------


def with_callback(name: str, **options: Any) -> list[str]:
    """Return the words that add a callback of ``helpers.training_runs``."""
    words = [f"--callbacks.{name.lower()}", f"helpers.training_runs.{name}"]
    return words + [f"--callbacks.{name.lower()}.{option}={value}" for option, value in options.items()]


SIX = ["--trainer.max_steps", "6", "--trainer.gradient_clip=null"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_resume_after_a_signal_is_byte_identical(number, recipe, trained, tmp_path):
    done = succeeded(fit(recipe, tmp_path / "run", *SIX, *with_callback("SignalIn", step=2, number=int(number))))
    assert "Traceback" not in done.stderr
    assert [(checkpoint.step, checkpoint.last) for checkpoint in checkpoints(tmp_path / "run")] == [(2, False), (3, True)]
    succeeded(fit(recipe, tmp_path / "run", *SIX, "--trainer.resume", "auto"))
    assert weight_bytes(tmp_path / "run") == weight_bytes(trained)


@pytest.mark.slow
def test_kill_during_a_save_loses_only_that_save(recipe, trained, tmp_path):
    done = fit(recipe, tmp_path / "run", *SIX, *with_callback("KillInSave", step=4))
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "run").glob(".*partial")] == [".checkpoint-4.partial"]
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path / "run")] == [2]
    succeeded(fit(recipe, tmp_path / "run", *SIX, "--trainer.resume", "auto"))
    assert weight_bytes(tmp_path / "run") == weight_bytes(trained)
    assert not list((tmp_path / "run").glob(".*partial"))


@pytest.mark.slow
def test_resume_after_random_kills_is_byte_identical(recipe, tmp_path):
    """A run that is killed twenty times, in steps and in saves, ends with the weights of an uninterrupted one."""
    words = ["--trainer.max_steps", "160", "--callbacks.checkpoint.every", "1", "--callbacks.checkpoint.keep", "2"]
    succeeded(fit(recipe, tmp_path / "whole", *words))
    moments = random.Random(0)
    folder, kills, progress = tmp_path / "run", 0, set()
    while True:
        process = start_command("fit", "--config", recipe, "--output_dir", str(folder), *words, "--trainer.resume", "auto")
        existing = {path.name for path in folder.glob("checkpoint-*")}
        while process.poll() is None and {path.name for path in folder.glob("checkpoint-*")} == existing:
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
def test_second_ctrl_c_stops_at_once_without_a_traceback(recipe, tmp_path):
    done = fit(recipe, tmp_path / "run", *with_callback("SignalIn", step=1, number=int(signal.SIGINT), times=2))
    assert done.returncode == 128 + signal.SIGINT
    assert "Traceback" not in done.stderr and "interrupt again to stop at once" in done.stderr
    assert not checkpoints(tmp_path / "run")


# -- disks ---------------------------------------------------------------------------------------------------------------


def intact(folder: Path, step: int) -> None:
    """Check that a complete checkpoint exists, and no partial one."""
    assert [checkpoint.step for checkpoint in checkpoints(folder)] == [step]
    assert not list(folder.glob("**/*partial*"))
    assert all(len(tensor) for tensor in weights(folder / f"checkpoint-{step}").values())


@pytest.mark.slow
def test_broken_pipe_ends_without_a_traceback(recipe, tmp_path):
    printing = ["--callbacks.summary", "callbacks.RunSummary", "--callbacks.log", "callbacks.ProgressBar"]
    run = ["fit", "--config", recipe, "--output_dir", str(tmp_path / "run"), *printing]
    fit = shlex.join([sys.executable, "-m", "bumblebee", *run])
    words = ["bash", "-c", f"{fit} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(bumblebee.__file__).parents[1])}
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment)
    assert len(done.stdout.splitlines()) == 1
    assert done.returncode == 128 + signal.SIGPIPE, "the exit code of a traceback would be 1"


@pytest.mark.slow
def test_full_disk_during_a_save_keeps_the_earlier_checkpoint(recipe, trained, tmp_path):
    done = fit(recipe, tmp_path / "run", *SIX, *with_callback("FullDisk", step=3))
    assert done.returncode == 2
    assert re.search("cannot write|File too large", one_line(done))
    intact(tmp_path / "run", 2)
    succeeded(fit(recipe, tmp_path / "run", *SIX, "--trainer.resume", "auto"))
    assert weight_bytes(tmp_path / "run") == weight_bytes(trained)


@pytest.mark.slow
def test_full_disk_at_the_start_is_one_line(recipe, tmp_path):
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    done = fit(recipe, tmp_path / "run", preexec_fn=limit, env={"BUMBLEBEE_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not list((tmp_path / "cache").glob("tokens/[!.]*"))


@pytest.mark.slow
def test_removed_output_folder_is_one_line(recipe, tmp_path):
    """The folder is replaced by a file, which not even root can write a checkpoint into."""
    done = fit(recipe, tmp_path / "run", *SIX, *with_callback("ReplaceFolder", step=3))
    assert done.returncode == 2
    assert str(tmp_path / "run") in one_line(done)


# -- two ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "launcher"), [(0, "torchrun"), pytest.param(3, "deepspeed", marks=pytest.mark.slow)])
def test_two_ranks_exit_with_0_and_only_rank_0_prints(stage, launcher, recipe, tmp_path):
    words = ["--trainer.zero_stage", str(stage), "--callbacks.bar", "callbacks.ProgressBar", "--callbacks.bar.interval", "0",
             "--callbacks.summary", "callbacks.RunSummary"]  # fmt: skip
    done = succeeded(fit(recipe, tmp_path / "run", *words, ranks=2, launcher=launcher))
    assert len(re.findall("^step 2/2", done.stdout, re.MULTILINE)) == 1
    assert done.stdout.count("Bumblebee 0") == 1
    assert "FutureWarning" not in done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_error_of_two_ranks_is_one_line_and_ends_torchruns_report(recipe, tmp_path):
    done = fit(recipe, tmp_path / "run", "--trainer.max_step", "3", ranks=2)
    report = done.stderr[done.stderr.index("Root Cause") :]
    assert one_line(done) == "bumblebee: unknown option 'trainer.max_step' (did you mean 'trainer.max_steps'?)"
    assert f"traceback : {one_line(done)}" in report


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(8))
def test_two_ranks_exit_with_0_time_after_time(turn, recipe, tmp_path):
    words = ["--trainer.zero_stage", str(turn % 4), "--callbacks.checkpoint=null"]
    succeeded(fit(recipe, tmp_path / "run", *words, ranks=2))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_full_disk_ends_both_ranks(stage, recipe, tmp_path):
    words = [*SIX, "--trainer.zero_stage", str(stage), *with_callback("FullDisk", step=3)]
    done = fit(recipe, tmp_path / "run", *words, ranks=2, timeout=60)
    assert done.returncode != 0
    assert re.search("cannot write|File too large", one_line(done))
    intact(tmp_path / "run", 2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_full_disk_of_rank_1_ends_both_ranks(stage, recipe, tmp_path):
    words = [*SIX, "--trainer.zero_stage", str(stage), *with_callback("FullDisk", step=3, rank=1)]
    done = fit(recipe, tmp_path / "run", *words, ranks=2, timeout=60)
    assert done.returncode != 0
    intact(tmp_path / "run", 2)


@pytest.mark.slow
def test_user_error_of_two_ranks_is_printed_once(recipe, tmp_path):
    for words in (["--data.files", "nowhere.jsonl"], ["--trainer.max_step", "3"], ["--output_dir", "/proc/nowhere/run"]):
        done = fit(recipe, tmp_path / "run", *words, ranks=2, timeout=60)
        assert done.returncode != 0
        one_line(done)
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_error_in_training_ends_both_ranks(recipe, tmp_path):
    for rank in (0, 1):
        done = fit(recipe, tmp_path / f"run{rank}", *with_callback("Fail", step=1, rank=rank), ranks=2, timeout=60)
        assert done.returncode != 0
        assert "on fire" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_ends_the_other_with_a_message(rank, launcher, recipe, trained, tmp_path):
    words = [*with_callback("KillIn", step=3, rank=rank), *SIX]
    start_time = time.monotonic()
    done = fit(recipe, tmp_path / "run", *words, ranks=2, launcher=launcher, timeout=120)
    assert time.monotonic() - start_time < 60 + 30  # a minute, and the start-up
    assert done.returncode != 0
    assert "bumblebee: another rank exited" in done.stderr and "--trainer.resume auto" in done.stderr
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path / "run")] == [2]


@pytest.mark.slow
def test_resume_after_a_signal_to_the_launcher_is_byte_identical(recipe, tmp_path):
    words = ["--trainer.max_steps", "400", "--callbacks.checkpoint.every", "50"]
    succeeded(fit(recipe, tmp_path / "whole", *words, ranks=2))
    process = start_command("fit", "--config", recipe, "--output_dir", str(tmp_path / "run"), *words, ranks=2)
    while not checkpoints(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # torchrun forwards it to the ranks
    finish(process, 120)
    assert checkpoints(tmp_path / "run")[-1].last
    succeeded(fit(recipe, tmp_path / "run", *words, "--trainer.resume", "auto", ranks=2))
    assert weight_bytes(tmp_path / "run") == weight_bytes(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_ctrl_c_in_a_terminal_saves_under_a_launcher(launcher, recipe, tmp_path):
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
def test_concurrent_runs_share_one_token_cache(recipe, tmp_path):
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


def test_local_rank_before_the_command_is_ignored():
    assert succeeded(run_command("--local_rank=1", "--version")).stdout == f"{bumblebee.__version__}\n"


@pytest.mark.slow
def test_installed_program_finds_classes_in_the_current_folder(recipe, tmp_path):
    program = Path(sys.executable).with_name("bumblebee")
    if not program.exists():
        pytest.skip("bumblebee is not installed as a program")
    (tmp_path / "mine.py").write_text("from bumblebee import Callback\n\n\nclass Mine(Callback):\n    pass\n")
    (tmp_path / "yaml.py").write_text("raise SystemExit('a file here hides an installed module')\n")
    command = ["fit", "--config", recipe, "--callbacks.mine", "mine.Mine", "--print_config"]
    done = finish(start([str(program), *command], cwd=tmp_path))
    assert yaml.safe_load(succeeded(done).stdout)["callbacks"]["mine"]["class_path"] == "mine.Mine"
