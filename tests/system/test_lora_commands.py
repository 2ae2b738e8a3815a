"""LoRA on the command line: the recipe, its folder in every command that takes a model, and error messages."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import ROOT, run_command

from bumblebee import Bumblebee, Tokenizer
from bumblebee.cli.main import main

WORDS = ("--data.max_length", "64", "--trainer.max_steps", "2", "--trainer.micro_batch_size", "2", "--trainer.accumulate", "1")
QUICK = (
    *WORDS,
    "--trainer.device",
    "cpu",
    "--callbacks.plot=null",
    "--data.files",
    "talk.jsonl",
    "--data.validation_ratio",
    "0.2",
)


@pytest.fixture(scope="module")
def place(tiny: Callable[..., Any], tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/pretrain and a few conversations."""
    folder = tmp_path_factory.mktemp("place")
    Bumblebee(tiny(vocab_size=400, tie_word_embeddings=True)).save_pretrained(folder / "runs" / "pretrain")
    Tokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder / "runs" / "pretrain")
    talks = [{"instruction": f"What is {number}?", "input": "", "output": f"A number: {number}."} for number in range(40)]
    (folder / "talk.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return folder


def succeeded(place: Path, *words: str) -> str:
    done = run_command(*words, cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def documented() -> list[list[str]]:
    """The commands of docs/lora.md in order."""
    text = (ROOT / "docs" / "lora.md").read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)).splitlines()
    return [shlex.split(line)[1:] for line in lines if line]


@pytest.mark.slow
def test_lora_page_runs_as_written(place: Path) -> None:
    fit, merge, generate = documented()
    recipe = str(ROOT / "recipes" / "sft_lora.yaml")
    out = succeeded(place, *[recipe if word == "recipes/sft_lora.yaml" else word for word in fit], *QUICK)
    assert re.search(r"parameters, .* \(\d+\.\d+%\) trainable", out)
    run = place / "runs" / "sft_lora"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {file.name for file in run.iterdir()}
    assert "float32: maximum logit difference" in succeeded(place, *merge)
    succeeded(place, *generate)
    # Adapter folders work without merging.
    assert succeeded(place, "generate", "--model", str(run), *generate[3:], "--temperature", "0") == succeeded(
        place, *generate, "--temperature", "0"
    )
    assert "validation_loss" in succeeded(place, "validate", "--config", str(run / "recipe.yaml"))


@pytest.mark.slow
def test_dora_at_stage_3_samples_and_chains_runs(place: Path) -> None:
    recipe = ("--config", str(ROOT / "recipes" / "sft_lora.yaml"))
    (place / "more.yaml").write_text(
        "task: {init_args: {transforms: [{class_path: bumblebee.lora.LoRA, init_args: {rank: 2, dora: true}}]}}\n"
        "callbacks: {samples: {class_path: callbacks.Samples, init_args: {prompts: [What], every: 1, max_new_tokens: 4}}}\n"
    )
    more = ("--config", "more.yaml", *QUICK, "--trainer.zero_stage", "3")
    succeeded(place, "fit", *recipe, *more, "--output_dir", "runs/one")
    assert len((place / "runs" / "one" / "samples.jsonl").read_text().splitlines()) == 2
    model = ("--task.model.folder", "runs/one", "--data.tokenizer", "runs/one")
    succeeded(place, "fit", *recipe, *more, *model, "--output_dir", "runs/two")
    named = json.loads((place / "runs" / "two" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(place / "runs" / "one")
    succeeded(place, "generate", "--model", "runs/two", "--prompt", "What", "--max_new_tokens", "4")


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ("{rank: 0}", "rank must be at least 1, got 0"),
        ("{targets: [query]}", "targets: 'query' matches no layer; available are down_proj, gate_proj"),
        ("{ranks: 3}", "ranks"),
    ],
)
def test_a_wrong_option_is_one_line(
    place: Path, transform: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    text = (ROOT / "recipes" / "sft_lora.yaml").read_text()
    (place / "wrong.yaml").write_text(re.sub(r"init_args: \{rank: .*\}", f"init_args: {transform}", text))
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", "wrong.yaml", *QUICK])
    lines = capsys.readouterr().err.splitlines()
    assert done.value.code == 2 and len(lines) == 1 and message in lines[0], lines
