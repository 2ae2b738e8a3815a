"""The files of docs/research.md are written, its commands run, and each part has the effect that the page describes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from helpers.documents import RESEARCH, ROOT, commands, run_in_shell, served, shell_environment
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes in which all of the page has been run; ``printed.json`` maps commands to their output."""
    folder = tmp_path_factory.mktemp("research")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    write_files(RESEARCH.read_text(encoding="utf-8"), folder)
    *run, last = commands(RESEARCH)
    assert last == "tensorboard --logdir runs"
    printed = {command: done(command, folder) for command in run}
    (folder / "printed.json").write_text(json.dumps(printed))
    return folder


def write_files(page: str, folder: Path) -> None:
    """Append each Python and YAML block of the page to the file that its first line names."""
    for body in re.findall(r"```(?:python|yaml)\n(.*?)```", page, flags=re.DOTALL):
        (name,) = re.findall(r"\A# ([\w.]+)", body)
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(body)


def done(command: str, folder: Path) -> str:
    """Run a command and return its output; for a server, the finish reason of a completion."""
    if not command.startswith("bumblebee serve"):
        return run_in_shell(command, folder, timeout=240)
    with served(command, folder) as port:
        asked = {"model": "bumblebee", "prompt": "The bees", "max_tokens": 4}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=asked, timeout=60)
        return answer.raise_for_status().json()["choices"][0]["finish_reason"]


def config(place: Path, run: str) -> dict[str, Any]:
    return json.loads((place / "runs" / run / "config.json").read_text())


def weights(place: Path, run: str) -> dict[str, Any]:
    return load_file(place / "runs" / run / "model.safetensors")


def logged(place: Path, run: str) -> dict[str, Any]:
    """The last line of training's metrics."""
    lines = map(json.loads, (place / "runs" / run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line][-1]


def test_overridden_mlp_reads_extra_from_the_command_line(place: Path) -> None:
    assert "model.layers.0.mlp.down_proj.bias" in weights(place, "sparse")
    assert [config(place, run)["extra"] for run in ("sparse", "sparser")] == [{"k": 32}, {"k": 8}]
    assert logged(place, "sparse")["loss"] != logged(place, "sparser")["loss"]


def test_a_norm_and_positions_are_in_the_model(place: Path) -> None:
    assert weights(place, "norm_free")["model.layers.0.input_layernorm.scale"].shape == (1,)
    assert weights(place, "learned")["model.positions.weight"].shape == (256, 64)
    assert config(place, "learned")["model_class"] == "research.LearnedPositions"


def test_a_term_of_the_loss_is_logged_and_part_of_it(place: Path) -> None:
    line = logged(place, "z_loss")
    assert line["z"] == pytest.approx(36, abs=2), "ln(400)^2: nothing is known before training"
    assert line["loss"] == pytest.approx(line["cross_entropy"] + 1e-3 * line["z"])
    assert line["tokens"] == logged(place, "deep")["tokens"], "each target counts once"


def test_a_callback_data_a_schedule_and_an_optimizer_are_used(place: Path) -> None:
    line = logged(place, "around")
    assert (place / "runs" / "around" / "over.txt").read_text() == "4 steps\n" and line["step_seconds"] > 0
    assert line["tokens"] == 4 * 2 * 8, "steps, rows, targets of a row"
    assert line["lr"] == pytest.approx(1e-3 * 0.1 ** (2 / 3)), "the last of three steps after one of warm-up"
    assert yaml.safe_load((place / "runs" / "around" / "recipe.yaml").read_text())["optimizer"]["class_path"] == "research.Sign"


def test_next_stage_keeps_the_class(place: Path) -> None:
    assert config(place, "sparse_sft")["model_class"] == "research.Sparse"
    printed = json.loads((place / "printed.json").read_text())
    (generated,) = (text for command, text in printed.items() if command.startswith("bumblebee generate"))
    (answered,) = (text for command, text in printed.items() if command.startswith("bumblebee serve"))
    assert generated and answered in ("length", "stop")
    refused = typed("bumblebee generate --model runs/sparse_sft --prompt x", place)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "was saved by research.Sparse" in refused.stderr


def test_other_commands_take_its_recipe_and_its_adapters(place: Path) -> None:
    assert "validation_loss" in run_in_shell("bumblebee validate --config runs/sparse/recipe.yaml", place, timeout=120)
    lora = """bumblebee fit --config recipes/sft_lora.yaml --task.model research.Sparse.from_pretrained
        --task.model.folder runs/sparse --data.tokenizer runs/sparse --trainer.precision fp32 --trainer.max_steps 2
        --output_dir runs/adapter"""
    run_in_shell(" ".join(lora.split()), place, timeout=240)
    merge = "bumblebee merge --adapter runs/adapter --output runs/merged --overwrite"
    refused = typed(merge, place)
    assert refused.returncode == 2 and "was saved by research.Sparse" in refused.stderr and "Traceback" not in refused.stderr
    assert "float32: maximum logit difference" in run_in_shell(f"{merge} --trust_remote_code", place, timeout=120)
    assert config(place, "merged")["model_class"] == "research.Sparse"


def typed(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=shell_environment(folder), capture_output=True, text=True, timeout=120
    )


def test_two_runs_are_in_one_tensorboard_folder_and_in_one_plot(place: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert (config(place, "deep")["num_hidden_layers"], config(place, "wide")["hidden_size"]) == (6, 128)
    for run in ("deep", "wide"):
        (folder,) = {file.parent for file in (place / "runs" / run).rglob("events.out.tfevents.*")}
        events = EventAccumulator(str(folder)).Reload()
        assert events.Scalars("train/loss")[-1].value == pytest.approx(logged(place, run)["loss"])
    assert (place / "runs" / "comparison.png").read_bytes().startswith(b"\x89PNG")
