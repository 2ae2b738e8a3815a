"""Distillation: its teachers, their tokenizers and vocabularies, every ZeRO stage, and refused options."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers.processes import run_jobs
from helpers.training_runs import Questions, Rows, small_model, train, weight_bytes, weights

from bumblebee import Distillation
from bumblebee.models.load_context import load_context
from bumblebee.preview.memory_estimate import BatchShape, ModelSize, TrainingSetup, activation_bytes
from bumblebee.tokenizer.tokenizer import Tokenizer

OPTIONS = {"divergence": "jsd", "jsd_beta": 0.4, "lm_weight": 0.3}
EACH = {"validation": ("Validation", {"every": 1})}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A wider model, whose vocabulary is padded to another size."""
    folder = tmp_path_factory.mktemp("teacher")
    small_model(1, hidden_size=48, initializer_range=0.2, vocab_size=72).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def rows():
    data = Rows()
    data.setup(0)
    return data


def evaluated(task: Distillation, data: Rows) -> dict[str, float]:
    task.setup(data)
    task.begin_validation(torch.device("cpu"))
    with torch.no_grad():
        sums = task.validation_step(task.model, data.collate(data.train))
    return task.validation_metrics({name: float(value) for name, value in sums.items()})


def test_a_student_like_its_teacher_has_no_divergence(tmp_path, rows):
    model = small_model(0)
    model.save_pretrained(tmp_path)
    metrics = evaluated(Distillation(model, str(tmp_path), lm_weight=1.0), rows)
    assert metrics["validation_distill/divergence"] == pytest.approx(0, abs=1e-6)
    assert metrics["validation_distill/agreement"] == 1
    assert metrics["validation_loss"] == pytest.approx(metrics["validation_distill/lm_loss"])


def test_metrics_equal_those_of_full_logits_on_common_ids(teacher, rows):
    model = small_model(0, initializer_range=0.2)
    task = Distillation(model, teacher, divergence="reverse_kl", temperature=2.0)
    metrics, batch = evaluated(task, rows), rows.collate(rows.train)
    targets = batch["labels"] != -100
    with torch.no_grad():
        whole = [each(batch["input_ids"])[targets][:, :64] for each in (model, task.teacher.model)]
    q, p = (logits.div(2.0).log_softmax(1) for logits in whole)
    assert metrics["validation_loss"] == pytest.approx((q.exp() * (q - p)).sum(1).mean().item(), rel=1e-5)
    assert metrics["validation_distill/teacher_entropy"] == pytest.approx(-(p.exp() * p).sum(1).mean().item(), rel=1e-5)
    same = (whole[0].argmax(1) == whole[1].argmax(1)).double().mean().item()
    assert metrics["validation_distill/agreement"] == pytest.approx(same)


@pytest.mark.slow
def test_all_stages_and_precisions_train_alike(teacher, tmp_path):
    jobs = {
        "0": {"zero_stage": 0}, "1": {"zero_stage": 1}, "3": {"zero_stage": 3, "building": True},
        "0 bf16": {"zero_stage": 0, "precision": "bf16"}, "3 bf16": {"zero_stage": 3, "precision": "bf16"},
    }  # fmt: skip
    task = ("Distillation", {**OPTIONS, "teacher": teacher})
    lines = {name: train(tmp_path / name, task=task, max_steps=3, callbacks=EACH, **job) for name, job in jobs.items()}
    for name, of_run in lines.items():
        rounding = 1e-5 if "bf16" not in name else 5e-3
        for line, expected in zip(of_run, lines["0"], strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=rounding)
            assert line["loss"] == pytest.approx(line["distill/divergence"] + 0.3 * line["distill/lm_loss"], rel=1e-5)
    for key, tensor in weights(tmp_path / "3").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "0")[key], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_adapters_learn_from_a_teacher_at_stage_3(teacher, tmp_path):
    small_model(0, initializer_range=0.2).save_pretrained(tmp_path / "base")
    task = ("Distillation", {"teacher": teacher})
    job = {"task": task, "base": str(tmp_path / "base"), "lora": {"rank": 8, "dropout": 0.0}, "data": {"samples": 4}}
    lines = train(tmp_path / "run", **job, max_steps=12, zero_stage=3, micro_batch_size=4, accumulate=1)
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]


ON_POLICY = {"divergence": "reverse_kl", "max_new_tokens": 6, "samples_per_prompt": 2}
PROMPTS = {"data": ("Questions", {}), "model": {"vocab_size": 300}, "max_steps": 3}


@pytest.fixture(scope="module")
def larger_teacher(tmp_path_factory):
    """With the ids of the prompts' tokenizer."""
    folder = tmp_path_factory.mktemp("larger")
    small_model(1, hidden_size=48, initializer_range=0.2, vocab_size=320).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def questions():
    data = Questions()
    data.setup(0)
    return data


def test_the_student_samples_the_targets(larger_teacher, questions):
    task = Distillation(small_model(0, vocab_size=300), larger_teacher, **ON_POLICY)
    task.setup(questions)
    task.begin_validation(torch.device("cpu"))
    task.samples.run = SimpleNamespace(seed=1, engine=SimpleNamespace(whole_model=nullcontext))
    batch = questions.collate(questions.train[:3])
    ((first,),) = task.prepare_windows([[batch]], 0)
    ((again,),), ((later,),) = task.prepare_windows([[batch]], 0), task.prepare_windows([[batch]], 1)
    assert len(first["labels"]) == 6 and torch.equal(first["labels"], again["labels"])
    assert not torch.equal(first["labels"], later["labels"])
    counts = task.counts(first)
    assert counts["loss"] == (first["labels"] != -100).sum() and counts["completions"] == 6
    prompt = questions.train[0].ids
    assert first["input_ids"][0, : len(prompt)].tolist() == prompt
    assert first["labels"][0, len(prompt) - 1] != -100 and (first["labels"][0, : len(prompt) - 1] == -100).all()
    assert [text.prompt for text in task.sampled_texts()] == [questions.train[0].question]
    largest = task.largest_batch(batch)
    assert task.completions_of(largest) == (6, max(len(sample.ids) for sample in questions.train[:3]) + 6)
    assert task.training_step(task.model, first)["distill/length"] == counts["loss"]
    with pytest.raises(ValueError, match="lm_weight needs labels"):
        Distillation(task.model, larger_teacher, lm_weight=0.1).setup(questions)
    with pytest.raises(ValueError, match=r"task\.max_new_tokens: 9000 and the longest prompt"):
        Distillation(task.model, larger_teacher, max_new_tokens=9000).setup(questions)


@pytest.mark.slow
def test_on_policy_resumes_exactly_and_two_ranks_sample_alike(larger_teacher, tmp_path):
    job = {"task": ("Distillation", {**ON_POLICY, "teacher": larger_teacher}), **PROMPTS}
    saved = {"checkpoint": ("Checkpoint", {"every": 1, "keep": None})}
    expected = train(tmp_path / "whole", **job, zero_stage=1)
    train(tmp_path / "resumed", **job, zero_stage=1, callbacks={**saved, "stop": ("StopAfter", {"step": 2})})
    train(tmp_path / "resumed", **job, zero_stage=1, callbacks=saved, resume="auto")
    assert weight_bytes(tmp_path / "resumed") == weight_bytes(tmp_path / "whole")
    two = {**job, "folder": str(tmp_path / "two"), "zero_stage": 3, "accumulate": 1, "building": True}
    two["task"] = ("Distillation", {**ON_POLICY, "teacher": larger_teacher, "gather_weights": "layers"})
    (result,) = run_jobs([two], 2, tmp_path, timeout=280)
    for line, other in zip(result["metrics"], expected, strict=True):
        assert line["distill/length"] == other["distill/length"]
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_the_teachers_logits_are_in_the_memory_estimate():
    with load_context(shapes_only=True):
        size = ModelSize.of(small_model(0, vocab_size=1000))
    setup, batch = TrainingSetup("fp32", 0), BatchShape(rows=1, length=16, targets=16)
    two = activation_bytes(size, setup, BatchShape(rows=1, length=16, targets=16, heads=Distillation.heads))
    assert two - activation_bytes(size, setup, batch) == 4 * 16 * 1000


def test_another_tokenizer_is_refused_and_more_tokens_are_not(tokenizer_folder, tmp_path, rows):
    small_model(1, vocab_size=500).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_folder / name, tmp_path)
    rows.tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    task = Distillation(small_model(0, vocab_size=500), str(tmp_path))
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    added = {**stored["added_tokens"][-1], "id": rows.tokenizer.vocab_size, "content": "<|more|>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**stored, "added_tokens": [*stored["added_tokens"], added]}))
    task.setup(rows)
    Tokenizer.train(["a completely different text, abababab"], 300).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"teacher: .* has another tokenizer than the data: the id \d+ is"):
        task.setup(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence must be forward_kl, reverse_kl or jsd, got 'kl'"),
        ({"jsd_beta": 1.5}, "jsd_beta must be in \\[0, 1\\], got 1.5"),
        ({"temperature": 0.0}, "temperature must be more than 0, got 0.0"),
        ({"lm_weight": -1.0}, "lm_weight must be at least 0, got -1.0"),
        ({"teacher": "nowhere"}, "folder not found: nowhere"),
    ],
)
def test_options_out_of_range_are_refused(options, message, teacher):
    with pytest.raises(ValueError, match=message):
        Distillation(small_model(), **{"teacher": teacher, **options})
