"""``bumblebee preview`` from end to end: its report, its errors, its side effects. Memory: test_memory_of_runs.py."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from helpers.recipe_files import RECIPE, SAMPLES

from bumblebee.cli.main import main
from bumblebee.config import BumblebeeConfig
from bumblebee.model import Bumblebee
from bumblebee.preview.data_subset import select_micro_batches
from bumblebee.preview.dry_run import MAX_MICRO_BATCHES, DryRunError, failure_reason
from bumblebee.preview.parameter_counts import count_by_component
from bumblebee.preview.sparkline import sparkline

ROOT = Path(__file__).parents[2]
QUICK = ("--measure", "never", "--samples", "0")


@pytest.fixture
def recipe(tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe in the current folder, which holds nothing else."""
    monkeypatch.chdir(tmp_path)
    text = RECIPE.replace("files: data.jsonl", f"files: {SAMPLES / 'pretrain.jsonl'}").replace("tok\n", f"{tokenizer_folder}\n")
    (tmp_path / "recipe.yaml").write_text(text)
    return "recipe.yaml"


def preview(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The printed report."""
    main(["preview", *words])
    return capsys.readouterr().out


def error_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The error message of a command that exits with code 2."""
    with pytest.raises(SystemExit) as done:
        main(["preview", *words])
    assert done.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bumblebee: ")]
    assert len(lines) == 1
    return lines[0]


# -- report ------------------------------------------------------------------------------------------------------------


def test_report_fits_one_page_and_nothing_is_written(recipe, capsys):
    shown = preview(capsys, "--config", recipe, "--measure", "never")
    for section in ("samples:", "data: Pretrain", "plan", "parameters", "memory per device", "time: about"):
        assert re.search(rf"^{section}", shown, re.MULTILINE), shown
    assert "⟦" in shown
    assert len(shown.splitlines()) < 60
    assert max(map(len, shown.splitlines())) <= 128
    assert [path.name for path in Path().iterdir()] == ["recipe.yaml"]


def test_plan_has_batch_size_steps_and_learning_rate(recipe, capsys):
    words = ("--config", recipe, *QUICK, "--trainer.max_steps", "null", "--trainer.epochs", "2", "--trainer.accumulate", "4")
    shown = preview(capsys, *words, "--ranks", "3")
    windows = int(re.search(r"windows +(\d+) of 32 tokens", shown)[1])
    each = 2 * 4 * 3
    per_epoch = -(-windows // each)
    assert f"micro-batch 2 × accumulate 4 × 3 ranks = {each} samples" in shown
    assert f"{per_epoch} per epoch × 2 epochs = {2 * per_epoch}" in shown
    warmup = -(-2 * per_epoch // 10)
    assert f"Cosine, warm-up {warmup} steps: 0 in step 1, 0.001 in step {warmup + 1}" in shown
    assert "output               out\n" in shown


def test_large_model_is_estimated_without_being_built(recipe, capsys):
    began = time.monotonic()
    shown = preview(capsys, "--config", recipe, "--samples", "0", "--task.model", str(ROOT / "recipes/models/72b.yaml"))
    assert time.monotonic() - began < 60
    assert re.search(r"total +72\.7 G +72\.7 G +\(100", shown)
    assert re.search(r"estimated: the run needs [\d,.]+ GB, .* are free", shown)


def test_weights_of_a_model_folder_are_not_read(recipe, capsys, tmp_path):
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
    assert "has no model.safetensors" in error_line(capsys, "--config", recipe, *QUICK, "--task.model", model)


def test_gpu_memory_is_estimated_without_a_gpu(recipe, capsys):
    shown = preview(capsys, "--config", recipe, "--gpu", "--samples", "0", "--ranks", "8", "--trainer.zero_stage", "3")
    assert "fp32, ZeRO stage 3, 8 × cuda" in shown
    assert "time: unknown" in shown


def with_rows(recipe: str, options: str = "") -> str:
    """The recipe with a DataModule and a task defined outside of the packages."""
    text = Path(recipe).read_text().replace("bumblebee.LanguageModeling", "helpers.training_runs.Noisy")
    begin, end = text.index("data:"), text.index("optimizer:")
    data = f"data: {{class_path: helpers.training_runs.Rows{options}}}"
    Path("own.yaml").write_text(
        f"{text[:begin]}{data}\n\n{text[end:]}".replace("bumblebee.LanguageModeling", "helpers.training_runs.Noisy")
    )
    return "own.yaml"


def test_user_defined_datamodule_and_task_are_supported(recipe, capsys):
    shown = preview(capsys, "--config", with_rows(recipe), "--measure", "never")
    assert "data: Rows" in shown
    assert "training samples     22" in shown


def unanswered(prompts: list[str], completions: list[str], records: list[dict[str, object]]) -> list[float]:
    """A reward with a bug: the answer's case is wrong."""
    return [float("ANSWER" in completion) for completion in completions]


def test_prompts_are_shown_with_the_rewards_of_their_answers(tokenizer_folder, capsys, tmp_path, monkeypatch):
    """Special tokens and the last line break included; a reward that an answer does not get is pointed out."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tokenizer_folder, "sft")
    Bumblebee(BumblebeeConfig.preset("tiny", vocab_size=400, num_hidden_layers=1)).save_pretrained("sft")
    files = {"task.model.folder": "sft", "data.tokenizer": "sft", "data.files": str(SAMPLES / "prompts.jsonl")}
    words = ["--config", str(ROOT / "recipes" / "grpo_full.yaml"), "--measure", "never", "--trainer.zero_stage", "3"]
    words += [word for name, value in files.items() for word in (f"--{name}", value)]
    shown = preview(capsys, *words, "--samples", "2")
    assert "28 tokens in 28 positions  " in shown and "padding" not in shown
    assert "<|im_start|>user⏎What is 10 + 38?<|im_end|>⏎<|im_start|>assistant⏎\n" in shown
    assert shown.count("→ its 'answer', 48: reward 1\n") == 1 and shown.count("→ empty completion: reward 0\n") == 2
    assert "KV cache of 64 × 156 tokens and the whole weights, instead of activations" in shown
    assert "gathered weights     all at once (needs 0." in shown and "GB that are free on each device)" in shown
    shown = preview(capsys, *words, "--samples", "0", "--task.gather_weights", "layers")
    assert "KV cache of 64 × 156 tokens and the weights of a layer, instead of activations" in shown
    assert "gathered weights     layer by layer (task.gather_weights is layers)" in shown
    wrong = f"[{__name__}.unanswered, bumblebee.rewards.Matches]"
    options = [*words, "--samples", "1", "--task.rewards", wrong, "--task.rewards.pattern", "x", "--data.system", "Be brief."]
    shown = preview(capsys, *options)
    assert "<|im_start|>system⏎Be brief.<|im_end|>" in shown
    doubt = "(not more than for an empty completion: is the reward right?)"
    assert f"→ its 'answer', 48: reward 0 (unanswered 0, Matches 0)  {doubt}" in shown


def test_existing_run_in_the_output_folder_gives_a_note(recipe, capsys):
    Path("out").mkdir()
    Path("out/metrics.jsonl").touch()
    assert "note: output_dir: out already holds a run" in preview(capsys, "--config", recipe, *QUICK)
    assert "note:" not in preview(capsys, "--config", recipe, *QUICK, "--overwrite")


def test_other_ranks_print_nothing(recipe, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert preview(capsys, "--config", recipe, *QUICK) == ""


# -- errors ------------------------------------------------------------------------------------------------------------


def test_data_without_targets_is_an_error(recipe, capsys):
    line = error_line(capsys, "--config", with_rows(recipe, ", init_args: {targets: [0]}"), *QUICK)
    assert "nothing to train on: none of the 22 training samples has a target" in line


def test_data_without_samples_that_fit_is_an_error(recipe, capsys):
    text = Path(recipe).read_text().replace("datamodules.Pretrain", "datamodules.SFT").replace("pretrain.jsonl", "sft.jsonl")
    Path(recipe).write_text(text.replace("max_length: 32", "max_length: 2"))
    assert re.search(r"data.files: none of \d+ conversations remains; longer than max_length 2: \d+ dropped", error_line(
        capsys, "--config", recipe, *QUICK
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
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
def test_invalid_options_are_one_line_errors(words, message, recipe, capsys):
    assert message in error_line(capsys, "--config", recipe, *QUICK, *words)


# -- dry run -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dry_run_measures_and_leaves_no_files(recipe, capsys):
    shown = preview(capsys, "--config", recipe, "--samples", "0")
    assert "(measured in a dry run)" in shown
    assert re.search(r"steps timed in a dry run", shown)
    assert [path.name for path in Path().iterdir()] == ["recipe.yaml"]


def test_failed_dry_run_falls_back_to_an_estimate(recipe, capsys, monkeypatch):
    def fail(*_: object) -> None:
        raise DryRunError(failure_reason(-9, ""))

    monkeypatch.setattr("bumblebee.preview.preview.dry_run", fail)
    shown = preview(capsys, "--config", recipe, "--samples", "0", "--measure", "always")
    assert "estimated: the dry run was killed by signal 9, possibly out of memory" in shown


def test_failure_reason_is_one_line():
    assert failure_reason(1, "Traceback\n  ...\ntorch.OutOfMemoryError: CUDA out of memory") == "out of memory"
    assert failure_reason(1, "Traceback\nRuntimeError: on fire\n") == "RuntimeError: on fire"
    assert failure_reason(1, "") == "the dry run failed without a message"


def test_dry_run_includes_the_longest_sample():
    import numpy

    class Data:
        train = range(100)
        lengths = numpy.arange(100) % 50

    micro_batches = select_micro_batches(Data(), 4, 0)  # type: ignore[arg-type]
    assert len(micro_batches) == 1 + MAX_MICRO_BATCHES
    assert max(Data.lengths[micro_batches[0]]) == 49
    assert all(len(indices) == 4 for indices in micro_batches[1:])


def test_dry_run_works_with_a_single_sample():
    class Data:
        train = range(1)
        lengths = None

    assert select_micro_batches(Data(), 4, 0) == [[0]] * (1 + MAX_MICRO_BATCHES)  # type: ignore[arg-type]


# -- parameter counts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_components_add_up_and_tied_embedding_counts_once(tied):
    model = Bumblebee(BumblebeeConfig.preset("tiny", num_hidden_layers=2, tie_word_embeddings=tied))
    model.model.layers.requires_grad_(False)
    counts = count_by_component(model)
    assert sum(count for count, _ in counts.values()) == model.num_parameters()
    assert sum(trainable for _, trainable in counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts["attention"][1] == counts["mlp"][1] == 0
    assert ("embedding and head" in counts) is tied
    assert ("head" in counts) is not tied


def test_components_of_other_models_are_found_by_name():
    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.mlp, self.lm_head = (torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)}) for _ in range(3))

    assert set(count_by_component(Other())) == {"attention", "mlp", "head"}


def test_sparkline_follows_the_values():
    line = sparkline(lambda step: min(step, 99 - step) / 50, 100, width=10)
    assert len(line) == 10
    assert line == line[::-1]
    assert line[4] == "█"
    assert list(line[:5]) == sorted(line[:5])
    assert sparkline(lambda step: 0.0, 3) == "   "
