"""callbacks.Evaluate: training is unchanged, values equal those of the saved model, and other callbacks can follow them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from bumblebee.callback import Callback
from bumblebee.checkpoint.trainer_state import checkpoints
from bumblebee.evaluation.context import EvaluationContext
from bumblebee.evaluation.tasks import Generation, MultipleChoice, Perplexity
from bumblebee.inference.generator import Generator
from bumblebee.model import Bumblebee
from bumblebee.tokenizer.tokenizer import Tokenizer
from callbacks import Checkpoint, EarlyStopping, Evaluate, MetricsHistory, Samples


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Makes the tasks, on files of their own."""
    folder = tmp_path_factory.mktemp("tasks")
    choices = [{"context": text, "choices": ["a hive", "nectar", "the"], "gold": 1} for text in ("A bee", "Honey", "It")]
    (folder / "choices.jsonl").write_text("".join(json.dumps(record) + "\n" for record in choices))
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "The bee", "answer": "x"}) + "\n")
    return lambda: {
        "choices": MultipleChoice(str(folder / "choices.jsonl")),
        "words": Generation(str(folder / "prompts.jsonl"), max_new_tokens=3),
        "texts": Perplexity(),
    }


class RandomState(Callback):
    def on_fit_end(self, trainer):
        self.state = torch.get_rng_state()


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "stage"), [("bf16", 0), ("fp32", 1), ("bf16", 2), ("fp32", 3)])
def test_training_is_the_same_to_the_byte(precision, stage, fit, tasks, tokenizer, tmp_path, read_lines):
    runs = []
    for name, more in (("with", {"evaluate": Evaluate(tasks(), every=1)}), ("without", {})):
        uses = {"history": MetricsHistory(), "state": RandomState(), **more}
        runs.append(fit(tmp_path / name, uses, tokenizer=tokenizer, max_steps=3, precision=precision, zero_stage=stage))
    first, second = runs
    assert first.error is None and second.error is None
    assert torch.equal(first.callbacks["state"].state, second.callbacks["state"].state)
    lines = [read_lines(run.folder / "metrics.jsonl") for run in runs]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    files = [(run.folder / "model.safetensors").read_bytes() for run in runs]
    assert files[0] == files[1]

    model = Generator.from_pretrained(first.folder, "cpu")
    choices = tasks()["choices"]
    context = EvaluationContext(model)
    metrics = choices.metrics(choices.results(context, choices.items(context), lambda count: None))
    assert lines[0][-1]["eval/choices"] == lines[0][-1]["eval/choices/acc"] == metrics["acc"].value
    assert {"eval/words", "eval/texts"} <= {*lines[0][0]}
    logged = [line for line in read_lines(first.folder / "evaluation.jsonl") if line["task"] == "choices"]
    assert [line["step"] for line in logged] == [1, 2, 3]
    assert logged[-1]["metrics"]["acc"]["stderr"] == pytest.approx(metrics["acc"].stderr)


class Scripted(Callback):
    """Reports a value of a task after each step."""

    evaluations = ("eval/bees",)

    def __init__(self, *values):
        self.values = values

    def on_step_end(self, trainer):
        trainer.report_evaluation({"eval/bees": self.values[trainer.step - 1]})


def test_best_checkpoint_and_early_stopping_follow_a_task(stub_trainer):
    best = Checkpoint(every=None, keep=1, best=1, metric="eval/bees", mode="max", save_last=False)
    stop = EarlyStopping("eval/bees", patience=2, mode="max")
    trainer = stub_trainer([Scripted(0.1, 0.5, 0.4, 0.3, 0.9, 0.9), best, stop])
    trainer.run()
    assert trainer.step == 4
    assert json.loads((trainer.output_dir / "best.json").read_text())["checkpoint"] == "checkpoint-2"
    assert 2 in [checkpoint.step for checkpoint in checkpoints(trainer.output_dir)]


def test_metric_without_its_task_is_refused(fit, tasks, tokenizer, tmp_path):
    stop = EarlyStopping("eval/chioces", mode="max")
    run = fit(tmp_path / "run", {"evaluate": Evaluate(tasks()), "stop": stop}, tokenizer=tokenizer)
    assert "no task reports the metric 'eval/chioces'; the tasks report eval/choices, eval/words" in str(run.error)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    run = fit(tmp_path / "other", {"evaluate": Evaluate({"x": MultipleChoice("gone.jsonl")})}, tokenizer=tokenizer)
    assert "callbacks: Evaluate: x: file not found: gone.jsonl" in str(run.error)


@pytest.mark.parametrize("callback", [Evaluate({"texts": Perplexity()}), Samples(prompts=["The bee"])])
def test_reward_models_are_refused(callback, tiny):
    model = Bumblebee(tiny())
    model.become_reward_model()
    trainer = SimpleNamespace(task=SimpleNamespace(model=model), data=SimpleNamespace(tokenizer=None))
    with pytest.raises(ValueError, match=f"{type(callback).__name__} needs a model that predicts tokens, not a reward"):
        callback.check(trainer)
