from __future__ import annotations

import pytest
import torch

from bumblebee.callback import Callback
from bumblebee.tokenizer.tokenizer import Tokenizer
from callbacks import Checkpoint, EarlyStopping, MetricsHistory, Samples

PROMPTS = ["The bee", "def f("]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def sampled(fit, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    uses = {"samples": Samples(PROMPTS, every=4, max_new_tokens=5), "history": MetricsHistory()}
    return fit(folder, uses, tokenizer=tokenizer)


def losses(read_lines, run):
    return [line["loss"] for line in read_lines(run.folder / "metrics.jsonl")]


def test_samples_are_written_every_n_steps_and_at_the_end(sampled, read_lines):
    lines = read_lines(sampled.folder / "samples.jsonl")
    assert [(line["step"], line["prompt"]) for line in lines] == [(step, prompt) for step in (4, 6) for prompt in PROMPTS]
    assert all(line["text"] for line in lines)
    for line in lines:
        assert f"sample at step {line['step']}: {line['prompt']}{line['text']}" in sampled.text


@pytest.mark.parametrize(
    ("precision", "stage"),
    [
        ("bf16", 0), ("fp32", 3), pytest.param("fp32", 1, marks=pytest.mark.slow),
        pytest.param("bf16", 2, marks=pytest.mark.slow),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_sampling_does_not_change_training(precision, stage, fit, tokenizer, tmp_path, read_lines):
    runs = []
    for name, more in (("with", {"samples": Samples(PROMPTS, every=1, max_new_tokens=3)}), ("without", {})):
        uses = {"history": MetricsHistory(), "state": RandomState(), "modes": TrainingModes(), **more}
        runs.append(fit(tmp_path / name, uses, tokenizer=tokenizer, max_steps=4, precision=precision, zero_stage=stage))
    first, second = runs
    assert first.error is None and (first.folder / "samples.jsonl").is_file()
    assert losses(read_lines, first) == losses(read_lines, second)
    assert torch.equal(first.callbacks["state"].state, second.callbacks["state"].state)
    assert first.callbacks["modes"].seen == [True] * 4
    files = [(run.folder / "model.safetensors").read_bytes() for run in runs]
    assert files[0] == files[1]


class RandomState(Callback):
    def on_fit_end(self, trainer):
        self.state = torch.get_rng_state()


class TrainingModes(Callback):
    """Records whether the model is in training mode at the start of each step."""

    def __init__(self):
        self.seen = []

    def on_step_start(self, trainer):
        self.seen.append(all(module.training for module in trainer.engine.model.modules()))


def test_zero_3_samples_equal_those_of_the_saved_model(fit, tokenizer, tmp_path, read_lines):
    """At stage 3 the trained model is sharded."""
    from bumblebee import Generator, SamplingParams

    fit(tmp_path / "run", {"samples": Samples(PROMPTS, temperature=0.0)}, tokenizer=tokenizer, max_steps=3, zero_stage=3)
    generations = Generator.from_pretrained(tmp_path / "run").generate(PROMPTS, SamplingParams(64, temperature=0.0))
    assert [line["text"] for line in read_lines(tmp_path / "run" / "samples.jsonl")] == [g.text for g in generations]


def test_resumed_run_writes_the_same_samples_once(fit, tokenizer, sampled, fail_after, tmp_path, read_lines):
    def uses():
        samples = Samples(PROMPTS, every=1, max_new_tokens=5)
        return {"samples": samples, "checkpoint": Checkpoint(every=2)}

    fit(tmp_path / "run", {**uses(), "fail": fail_after(3)}, tokenizer=tokenizer)
    run = fit(tmp_path / "run", uses(), tokenizer=tokenizer, resume="auto")
    assert run.error is None
    lines = read_lines(tmp_path / "run" / "samples.jsonl")
    assert [line["step"] for line in lines] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    expected = read_lines(sampled.folder / "samples.jsonl")
    assert [line for line in lines if line["step"] in (4, 6)] == expected


def test_stopped_run_samples_at_its_end(fit, scripted, tokenizer, tmp_path, read_lines):
    uses = {
        "samples": Samples(PROMPTS[:1], max_new_tokens=2),
        "stop": EarlyStopping(patience=1),
        "values": scripted(1.0, 2.0),
    }
    fit(tmp_path / "run", uses, tokenizer=tokenizer)
    assert [line["step"] for line in read_lines(tmp_path / "run" / "samples.jsonl")] == [2]


def test_prompts_are_required_unless_the_task_samples(fit, tokenizer, tmp_path):
    run = fit(tmp_path / "run", {"samples": Samples()}, tokenizer=tokenizer)
    assert isinstance(run.error, ValueError) and not (tmp_path / "run").exists()
    assert str(run.error) == "callbacks: Samples needs prompts to continue: LanguageModeling does not sample completions itself"


def test_tokenizer_is_required(fit, tmp_path):
    run = fit(tmp_path / "run", {"samples": Samples(PROMPTS)})
    assert isinstance(run.error, ValueError) and "Samples needs a tokenizer: set data.tokenizer" in str(run.error)


@pytest.mark.parametrize(("prompt", "message"), [("", "the prompt is empty"), ("bee " * 400, "the model takes 256")])
def test_invalid_prompt_raises_before_the_first_step(prompt, message, fit, tokenizer, tmp_path):
    run = fit(tmp_path / "run", {"samples": Samples([prompt])}, tokenizer=tokenizer)
    assert isinstance(run.error, ValueError) and message in str(run.error) and run.trainer.step == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "prompts must not be empty"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        Samples(**{"prompts": PROMPTS, **options})
