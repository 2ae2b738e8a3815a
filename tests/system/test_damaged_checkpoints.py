"""Two real ranks refuse a checkpoint with a flipped bit together, whichever rank reads the file, at any number of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.damage import flip_bit
from helpers.processes import run_command, run_jobs
from helpers.recipe_files import RECIPE, SAMPLES
from helpers.training_runs import train

from bumblebee.checkpoint.digests import NAME, read_digests

pytestmark = pytest.mark.slow

SAVE = {"checkpoint": ("Checkpoint", {"every": 2, "keep": None})}
STAGES = (0, 1, 3)


def shards(checkpoint: Path) -> list[str]:
    return sorted(name for name in read_digests(checkpoint) or {} if name.startswith("training_state/optimizer-"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks with checkpoints at steps 2 and 4."""
    root = tmp_path_factory.mktemp("two")
    jobs = [{"folder": str(root / f"{s}"), "zero_stage": s, "max_steps": 4, "callbacks": SAVE} for s in STAGES]
    assert not [result for result in run_jobs(jobs, 2, root) if "error" in result]
    return root


@pytest.fixture(scope="module")
def damaged(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies of the runs, each with one bit flipped in another file of checkpoint-4."""
    copies = {}
    for stage in STAGES:
        names = [*shards(runs / f"{stage}" / "checkpoint-4"), "training_state/random-00001.json"]
        for name in names:
            copy = shutil.copytree(runs / f"{stage}", tmp_path_factory.mktemp("damaged") / "run")
            flip_bit(Path(copy) / "checkpoint-4" / name)
            copies[f"{stage} {name}"] = Path(copy) / "checkpoint-4" / name
    return copies


def expected(file: Path) -> str:
    good = file.parents[2] / "checkpoint-2"
    return f"trainer.resume: {file} is damaged: its SHA-256 differs from the one in {NAME}; use the previous good" + (
        f" checkpoint: --trainer.resume {good}"
    )


def test_all_ranks_write_one_list(runs: Path) -> None:
    for stage in STAGES:
        checkpoint = runs / f"{stage}" / "checkpoint-4"
        assert len(shards(checkpoint)) == (1 if stage == 0 else 2)
        names = {file.relative_to(checkpoint).as_posix() for file in checkpoint.rglob("*") if file.is_file()}
        assert {*(read_digests(checkpoint) or {}), NAME} == names


def test_two_ranks_refuse_each_damaged_file(damaged: dict[str, Path], tmp_path: Path) -> None:
    jobs = [
        {"folder": str(tmp_path / f"{n}"), "zero_stage": int(key[0]), "resume": str(file.parents[1])}
        for n, (key, file) in enumerate(damaged.items())
    ]
    results = run_jobs(jobs, 2, tmp_path)
    assert [result["error"] for result in results] == [expected(file) for file in damaged.values()]


def test_one_rank_refuses_a_damaged_checkpoint_of_two(damaged: dict[str, Path], tmp_path: Path) -> None:
    for key, file in damaged.items():
        with pytest.raises(ValueError) as error:
            train(tmp_path / "one", zero_stage=int(key[0]), resume=str(file.parents[1]))
        assert str(error.value) == expected(file)


def test_two_ranks_resume_intact_checkpoints_of_one(tmp_path: Path) -> None:
    train(tmp_path / "one", zero_stage=1, max_steps=4, callbacks=SAVE)
    job = {"folder": str(tmp_path / "two"), "zero_stage": 3, "resume": str(tmp_path / "one" / "checkpoint-2")}
    flipped = shutil.copytree(tmp_path / "one", tmp_path / "flipped")
    (name,) = shards(Path(flipped) / "checkpoint-4")
    flip_bit(Path(flipped) / "checkpoint-4" / name)
    results = run_jobs([job, {**job, "resume": str(Path(flipped) / "checkpoint-4")}], 2, tmp_path)
    assert "metrics" in results[0]
    assert results[1] == {"error": expected(Path(flipped) / "checkpoint-4" / name)}


def test_command_reports_rank_1s_file_in_one_line(tokenizer_folder: Path, tmp_path: Path) -> None:
    text = RECIPE.replace("files: data.jsonl", f"files: {SAMPLES / 'pretrain.jsonl'}").replace("tok\n", f"{tokenizer_folder}\n")
    (tmp_path / "recipe.yaml").write_text(text)
    words = [
        "fit",
        "--config",
        str(tmp_path / "recipe.yaml"),
        "--output_dir",
        str(tmp_path / "run"),
        "--trainer.zero_stage",
        "3",
    ]
    assert run_command(*words, ranks=2).returncode == 0
    file = tmp_path / "run" / "checkpoint-2" / "training_state" / "optimizer-00001-of-00002.safetensors"
    flip_bit(file)
    done = run_command(*words, "--trainer.max_steps", "4", "--trainer.resume", "auto", ranks=2)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("bumblebee: ")]
    assert f"{file} is damaged" in line and line.endswith(f"--trainer.resume {tmp_path / 'run' / 'checkpoint-1'}")
    single = run_command(*words, "--trainer.max_steps", "4", "--trainer.resume", "auto")
    assert single.returncode == 2 and single.stderr.splitlines()[-1] == line
