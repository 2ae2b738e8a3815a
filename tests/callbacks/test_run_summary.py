from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch

from bumblebee.lora import LoRA
from bumblebee.model import Bumblebee
from bumblebee.optim import ReduceOnPlateau
from bumblebee.training.run_summary import format_summary, summarize
from bumblebee.transforms import ActivationCheckpointing, Compile
from callbacks import Checkpoint, RunSummary, Validation
from callbacks.run_summary import format_outcome

PRECISIONS = [("fp32", 0), ("fp32", 1), ("bf16", 0), ("bf16", 1), ("fp16", 0), ("fp16", 2)]


@pytest.fixture(scope="session")
def summary(complete_run):
    return json.loads((complete_run.folder / "summary.json").read_text())


def test_model_section(summary):
    model = summary["model"]
    assert model["class"] == "Bumblebee" and model["attention"] == "sdpa"
    assert model["parameters"] == model["trainable_parameters"] == 20_768
    assert [model[name] for name in ("layers", "hidden_size", "heads", "kv_heads", "vocabulary")] == [2, 32, 4, 2, 64]


def test_plan_section(summary):
    assert summary["plan"] == {
        "epochs": 2.0, "steps_per_epoch": 3, "steps": 6, "micro_batch_size": 4, "accumulate": 2, "ranks": 1,
        "samples_per_step": 8,
    }  # fmt: skip


def test_optimizer_section(summary):
    assert summary["optimizer"]["class"] == "AdamW"
    options = [(group["learning_rate"], group["weight_decay"]) for group in summary["optimizer"]["groups"]]
    assert options == [(0.01, 0.1), (0.01, 0.0)]
    assert sum(group["parameters"] for group in summary["optimizer"]["groups"]) == summary["model"]["parameters"]


def test_data_schedule_device_and_callback_sections(summary):
    assert summary["data"] == {"class": "RandomTokens", "training samples": 22, "validation samples": 4}
    assert summary["schedule"] == {"class": "Linear", "warmup_ratio": 0.5, "warmup_steps": None, "min_ratio": 0.0}
    assert summary["device"] == {"device": "cpu", "name": None, "precision": "fp32", "zero_stage": 1}
    assert summary["callbacks"]["checkpoint"] == "Checkpoint" and len(summary["callbacks"]) == 8


def test_summary_is_printed_before_the_first_step(complete_run):
    begin, _, rest = complete_run.text.partition("step 1/6")
    assert begin.startswith("Bumblebee ") and "Bumblebee 0" not in rest
    for part in (
        "model      Bumblebee, 20.8 k parameters, all trainable, layers 2, hidden size 32, heads 4, kv heads 2, vocabulary 64,"
        " attention sdpa\n",
        "data       RandomTokens, training samples 22, validation samples 4\n",
        "plan       2 epochs of 3 steps = 6 steps of 8 samples (micro-batch 4 x accumulate 2 x ranks 1)\n",
        "device     1 x cpu, fp32, ZeRO stage 1\n",
        "optimizer  AdamW: lr 0.01, weight decay 0.1 for ",
        "gradient clip 1\n",
        "features   seed 42, checkpoint (every 2 steps), validation (every epoch)\n",
        f"output     {complete_run.folder}\n",
    ):
        assert part in begin


class WithTransforms(RunSummary):
    """Sets what a recipe with these options would have set, before the summary is made."""

    def on_fit_start(self, trainer):
        def freeze_half(model):
            """A function as a transform."""

        trainer.task.transforms = [LoRA(rank=8, alpha=16, dropout=0.0), Compile(), ActivationCheckpointing(2), freeze_half]
        trainer.data.max_length = 2048
        trainer.schedule = ReduceOnPlateau()
        super().on_fit_start(trainer)


@pytest.fixture
def featured(stub_trainer, capsys, tmp_path):
    """Printed block and summary.json of a run with all features."""
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}}
    callbacks = [WithTransforms(), Checkpoint(every=100, minutes=30.0, keep=2), Validation(every=50)]
    trainer = stub_trainer(callbacks, deepspeed=offload)
    trainer.call("on_fit_start")
    return capsys.readouterr().out, json.loads((tmp_path / "summary.json").read_text())


def test_features_line_names_what_changes_the_run(featured):
    line = next(line for line in featured[0].splitlines() if line.startswith("  features"))
    assert line == (
        "  features   LoRA (rank 8, alpha 16, targets all-linear), Compile (mode default), ActivationCheckpointing (every 2),"
        " freeze_half, optimizer state offloaded to cpu, seed 42, max length 2,048,"
        " callback 1 (every 100 steps, minutes 30, keep 2), callback 2 (every 50 steps)"
    )


def test_features_section_has_the_options(featured):
    features = featured[1]["features"]
    lora, compiled, checkpointing, function = features["transforms"]
    assert lora["class"] == "LoRA" and lora["targets"] == "all-linear" and lora["dora"] is False
    assert compiled == {"class": "Compile", "mode": "default"} and checkpointing["every"] == 2
    assert function == {"class": "freeze_half"} and features["offload"] == {"optimizer": "cpu"}
    assert (features["seed"], features["max_length"]) == (42, 2048)
    assert features["callbacks"]["callback 1"] == {"every": 100, "minutes": 30.0, "keep": 2, "best": 0}


def test_schedule_section_has_options_and_no_state(featured):
    assert "best" not in featured[1]["schedule"] and "bad" not in featured[1]["schedule"]
    assert "  schedule   ReduceOnPlateau, warmup ratio 0, reduce 0.1, patience 10, threshold 0.0001, min ratio 0" in featured[0]


def test_texts_with_commas_are_separated_by_semicolons(summary):
    data = {
        "class": "Pretrain",
        "documents": 1234,
        "longer than max_length 256": "202 dropped",
        "held out": "1 document, 3 targets",
    }
    text = format_summary({**summary, "data": data, "plan": {**summary["plan"], "epochs": 1.0, "steps": 1}})
    assert "Pretrain; documents 1,234; longer than max length 256: 202 dropped; held out: 1 document, 3 targets\n" in text
    assert "1 epoch of 3 steps = 1 step of 8 samples" in text


def test_long_lines_are_wrapped_with_an_indent(summary):
    lines = format_summary(summary, 60).splitlines()
    assert max(map(len, lines)) <= 60 or " " not in max(lines, key=len).strip()
    assert any(line.startswith(" " * 13) for line in lines)


@pytest.mark.parametrize("adapters", [False, True])
def test_outcome_names_what_was_saved(adapters, stub_trainer, monkeypatch, tmp_path):
    monkeypatch.setattr("bumblebee.lora.has_adapters", lambda model: adapters)
    trainer = stub_trainer([])
    outcome = format_outcome(trainer)
    assert outcome == f"finished at step 0/6, 0 tokens; {'adapter' if adapters else 'model'} saved in {tmp_path}"


@pytest.mark.parametrize(("precision", "stage"), PRECISIONS)
def test_summary_asks_for_the_dtype_that_attention_computes_in(precision, stage, stub_trainer, tiny, monkeypatch):
    """Also with QK-norm, which returns fp32 under autocast. fp16 needs a GPU only because of DeepSpeed."""
    requested = []

    def record(name: str, dtype: torch.dtype | None) -> str:
        requested.append(dtype)
        return "sdpa"

    trainer = stub_trainer([], precision=precision, zero_stage=stage)
    options = trainer.engine.options
    trainer.task.model = Bumblebee(tiny(qk_norm=True)).to(options.weights_dtype)
    monkeypatch.setattr("bumblebee.nn.attention_kernels.select_kernel", record)
    monkeypatch.setattr("bumblebee.nn.attention.select_kernel", record)
    summarize(trainer)
    autocast = options.weights_dtype != options.compute_dtype
    with torch.autocast("cpu", options.compute_dtype) if autocast else nullcontext():
        trainer.task.model(torch.zeros(1, 8, dtype=torch.int64))
    assert set(requested) == {options.compute_dtype} and len(requested) == 4  # two lines of the summary, two layers
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert options.compute_dtype == expected


def test_flash_attention_with_fp16_is_summarized(stub_trainer, monkeypatch):
    trainer = stub_trainer([], precision="fp16")
    trainer.task.model.attention = "flash"
    monkeypatch.setattr("bumblebee.nn.attention_kernels._machine_problems", {"flash": []})
    assert summarize(trainer)["model"]["attention"] == "flash"


def test_resumed_run_shows_its_step_and_the_initial_lr(resumed_run, summary):
    resumed = json.loads((resumed_run.folder / "summary.json").read_text())
    assert resumed["run"]["resumed_from_step"] == 4 and "resumed    from step 4\n" in resumed_run.text
    assert resumed["optimizer"] == summary["optimizer"]  # the initial learning rate, not that of the step


def test_zero_3_counts_whole_parameters(fit, tmp_path):
    run = fit(tmp_path / "run", {"summary": RunSummary()}, max_steps=1, zero_stage=3)
    assert run.error is None
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["model"]["parameters"] == 20_768
    assert sum(group["parameters"] for group in summary["optimizer"]["groups"]) == 20_768
