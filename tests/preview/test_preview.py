"""``bumblebee preview`` as a whole: what it shows, what it refuses, what it leaves alone. Memory: test_memory_of_runs.py."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from helpers.recipe_files import RECIPE, SAMPLES

from bumblebee.cli.main import main
from bumblebee.config import BumblebeeConfig
from bumblebee.model import Bumblebee
from bumblebee.preview import dry_run
from bumblebee.preview.dry_run import Failed, _why, places
from bumblebee.preview.parameter_counts import parts
from bumblebee.preview.sparkline import sparkline

ROOT = Path(__file__).parents[2]
QUICK = ("--measure", "never", "--samples", "0")


@pytest.fixture
def recipe(tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe in the current folder, which has nothing else."""
    monkeypatch.chdir(tmp_path)
    text = RECIPE.replace("files: data.jsonl", f"files: {SAMPLES / 'pretrain.jsonl'}").replace("tok\n", f"{tokenizer_folder}\n")
    (tmp_path / "recipe.yaml").write_text(text)
    return "recipe.yaml"


def preview(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is printed."""
    main(["preview", *words])
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as done:
        main(["preview", *words])
    assert done.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bumblebee: ")]
    assert len(lines) == 1
    return lines[0]


# -- what it shows -------------------------------------------------------------------------------------------------------


def test_everything_is_shown_on_one_page_and_nothing_is_written(recipe, capsys):
    shown = preview(capsys, "--config", recipe, "--measure", "never")
    for section in ("samples:", "data: Pretrain", "plan", "parameters", "memory of each device", "time: about"):
        assert re.search(rf"^{section}", shown, re.MULTILINE), shown
    assert "⟦" in shown
    assert len(shown.splitlines()) < 60
    assert max(map(len, shown.splitlines())) <= 128
    assert [path.name for path in Path().iterdir()] == ["recipe.yaml"]


def test_the_plan_is_that_of_the_run(recipe, capsys):
    words = ("--config", recipe, *QUICK, "--trainer.max_steps", "null", "--trainer.epochs", "2", "--trainer.accumulate", "4")
    shown = preview(capsys, *words, "--ranks", "3")
    windows = int(re.search(r"windows +(\d+) of 32 tokens", shown)[1])
    each = 2 * 4 * 3
    per_epoch = -(-windows // each)
    assert f"micro-batch 2 × accumulate 4 × 3 ranks = {each} samples" in shown
    assert f"{per_epoch} an epoch × 2 epochs = {2 * per_epoch}" in shown
    warmup = -(-2 * per_epoch // 10)
    assert f"Cosine, warm-up {warmup} steps: 0 in step 1, 0.001 in step {warmup + 1}" in shown
    assert "ends in              out, with the trained model" in shown


def test_a_large_model_takes_seconds_and_is_not_built(recipe, capsys):
    began = time.monotonic()
    shown = preview(capsys, "--config", recipe, "--samples", "0", "--task.model", str(ROOT / "recipes/models/72b.yaml"))
    assert time.monotonic() - began < 60
    assert re.search(r"total +72\.7 G +72\.7 G +\(100", shown)
    assert re.search(r"computed, not measured: it needs [\d,.]+ GB, .* are free", shown)


def test_of_a_model_folder_only_the_config_is_read(recipe, capsys, tmp_path):
    Bumblebee(BumblebeeConfig.preset("tiny", num_hidden_layers=1)).save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"no weights")
    model = json.dumps({"class_path": "bumblebee.Bumblebee.from_pretrained", "init_args": {"folder": str(tmp_path / "folder")}})
    shown = preview(capsys, "--config", recipe, *QUICK, "--task.model", model)
    assert re.search(r"embedding and head +1\.05 M +1\.05 M", shown)
    transforms = json.dumps([{"class_path": "bumblebee.lora.LoRA", "init_args": {"rank": 4}}])
    with_lora = preview(capsys, "--config", recipe, *QUICK, "--task.model", model, f"--task.transforms={transforms}")
    assert re.search(r"embedding and head +1\.05 M +0", with_lora)
    assert re.search(r"adapters +(\S+ k) +\1", with_lora)
    (tmp_path / "folder" / "model.safetensors").unlink()
    assert "has no model.safetensors" in refusal(capsys, "--config", recipe, *QUICK, "--task.model", model)


def test_memory_of_gpus_is_computed_where_there_is_none(recipe, capsys):
    shown = preview(capsys, "--config", recipe, "--gpu", "--samples", "0", "--ranks", "8", "--trainer.zero_stage", "3")
    assert "fp32, ZeRO stage 3, 8 × cuda" in shown
    assert "time: not known" in shown


def with_rows(recipe: str, options: str = "") -> str:
    """The recipe with a DataModule of one's own."""
    text = Path(recipe).read_text().replace("bumblebee.LanguageModeling", "helpers.training_runs.Noisy")
    begin, end = text.index("data:"), text.index("optimizer:")
    data = f"data: {{class_path: helpers.training_runs.Rows{options}}}"
    Path("own.yaml").write_text(
        f"{text[:begin]}{data}\n\n{text[end:]}".replace("bumblebee.LanguageModeling", "helpers.training_runs.Noisy")
    )
    return "own.yaml"


def test_a_datamodule_and_a_task_of_ones_own_are_shown(recipe, capsys):
    shown = preview(capsys, "--config", with_rows(recipe), "--measure", "never")
    assert "data: Rows" in shown
    assert "training samples     22" in shown


def test_a_run_that_is_there_is_mentioned(recipe, capsys):
    Path("out").mkdir()
    Path("out/metrics.jsonl").touch()
    assert "note: output_dir: out already holds a run" in preview(capsys, "--config", recipe, *QUICK)
    assert "note:" not in preview(capsys, "--config", recipe, *QUICK, "--overwrite")


def test_other_ranks_are_silent(recipe, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert preview(capsys, "--config", recipe, *QUICK) == ""


# -- what it refuses -----------------------------------------------------------------------------------------------------


def test_rows_without_any_target_are_refused(recipe, capsys):
    line = refusal(capsys, "--config", with_rows(recipe, ", init_args: {targets: [0]}"), *QUICK)
    assert "there is nothing to train on: none of 22 training samples has a target" in line


def test_samples_that_are_all_too_long_are_refused(recipe, capsys):
    text = Path(recipe).read_text().replace("datamodules.Pretrain", "datamodules.SFT").replace("pretrain.jsonl", "sft.jsonl")
    Path(recipe).write_text(text.replace("max_length: 32", "max_length: 2"))
    assert re.search(r"data.files: none of \d+ conversations is left; longer than max_length 2: \d+ dropped", refusal(
        capsys, "--config", recipe, *QUICK
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data.files", "absent.jsonl"], "absent.jsonl"),
        (["--optimizer.lr", "-1"], "Invalid learning rate: -1"),
        (["--trainer.deepspeed", "{optimizer: {}}"], "set by the recipe's optimizer"),
        (["--trainer.precision", "fp16"], "fp16 needs a GPU"),
        (["--task.model.config.vocab_size", "10"], "the tokenizer has"),
        (["--samples", "-1"], "samples"),
        (["--ranks", "0"], "ranks"),
        (["--measure", "sometimes"], "auto, always or never"),
        (["--trainer.epoch", "3"], "did you mean 'trainer.epochs'"),
    ],
)
def test_mistakes_are_told_in_one_line(words, told, recipe, capsys):
    assert told in refusal(capsys, "--config", recipe, *QUICK, *words)


# -- measuring -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_rehearsal_measures_and_leaves_nothing(recipe, capsys):
    shown = preview(capsys, "--config", recipe, "--samples", "0")
    assert "(measured: a few steps)" in shown
    assert re.search(r"steps timed on this device", shown)
    assert [path.name for path in Path().iterdir()] == ["recipe.yaml"]


def test_where_measuring_fails_memory_is_computed_and_the_reason_told(recipe, capsys, monkeypatch):
    def fail(*_: object) -> None:
        raise Failed(_why(-9, ""))

    monkeypatch.setattr("bumblebee.preview.preview.rehearse", fail)
    shown = preview(capsys, "--config", recipe, "--samples", "0", "--measure", "always")
    assert "computed, not measured: the process was ended by signal 9, as when memory runs out" in shown


def test_reasons_of_failures_are_one_line():
    assert _why(1, "Traceback\n  ...\ntorch.OutOfMemoryError: CUDA out of memory") == "not enough memory"
    assert _why(1, "Traceback\nRuntimeError: on fire\n") == "RuntimeError: on fire"
    assert _why(1, "") == "no message"


def test_the_micro_batch_with_the_longest_sample_is_measured():
    import numpy

    class Data:
        train = range(100)
        lengths = numpy.arange(100) % 50

    chosen = places(Data(), 4, 0)  # type: ignore[arg-type]
    assert len(chosen) == 1 + dry_run.MOST
    assert max(Data.lengths[chosen[0]]) == 49
    assert all(len(place) == 4 for place in chosen[1:])


def test_a_sample_alone_is_measured_as_well():
    class Data:
        train = range(1)
        lengths = None

    assert places(Data(), 4, 0) == [[0]] * (1 + dry_run.MOST)  # type: ignore[arg-type]


# -- parts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_parts_add_up_to_the_model_and_a_tied_table_counts_once(tied):
    model = Bumblebee(BumblebeeConfig.preset("tiny", num_hidden_layers=2, tie_word_embeddings=tied))
    model.model.layers.requires_grad_(False)
    found = parts(model)
    assert sum(count for count, _ in found.values()) == model.num_parameters()
    assert sum(own for _, own in found.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["attention"][1] == found["feed-forward"][1] == 0
    assert ("embedding and head" in found) is tied
    assert ("head" in found) is not tied


def test_parts_of_another_model_are_found_by_their_names():
    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.mlp, self.lm_head = (torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)}) for _ in range(3))

    assert set(parts(Other())) == {"attention", "feed-forward", "head"}


def test_a_sparkline_rises_and_falls_with_the_values():
    line = sparkline(lambda step: min(step, 99 - step) / 50, 100, width=10)
    assert len(line) == 10
    assert line == line[::-1]
    assert line[4] == "█"
    assert list(line[:5]) == sorted(line[:5])
    assert sparkline(lambda step: 0.0, 3) == "   "
