"""Three real runs shared by the tests of this folder, and a trainer on a stub engine for logic that needs no training.

``complete_run`` trains six steps with most callbacks. ``crashed_run`` is the same run, which fails after its fifth step was
logged; ``resumed_run`` continues from its checkpoint at step 4 to the end.
"""

from __future__ import annotations

import io
import json
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.stub_engine import StubTrainer

import callbacks
from bumblebee.callback import Callback

STEPS = 6


class FailAfter(Callback):
    """Raises after a step has been logged; before it is saved if this callback comes before ``Checkpoint``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, trainer: Any) -> None:
        if trainer.step == self.step:
            raise RuntimeError("the disk is on fire")


class StopAfter(Callback):
    """Stops the run after a step, like a callback or, with ``interrupt``, like Ctrl-C."""

    def __init__(self, step: int, interrupt: bool = False) -> None:
        self.step, self.interrupt = step, interrupt

    def on_step_end(self, trainer: Any) -> None:
        if trainer.step == self.step:
            if self.interrupt:
                signal.raise_signal(signal.SIGINT)
            else:
                trainer.should_stop = True


class ScriptedValidation(Callback):
    """Reports given validation results: ``values[0]`` after step 1, and so on; None skips a validation."""

    def __init__(self, *values: float | None, metric: str = "validation_loss") -> None:
        self.values, self.metric = values, metric

    def on_step_end(self, trainer: Any) -> None:
        value = self.values[trainer.step - 1] if trainer.step <= len(self.values) else None
        if value is not None:
            trainer.call("on_validation_end", {self.metric: value})


def all_callbacks() -> dict[str, Callback | None]:
    return {
        "checkpoint": callbacks.Checkpoint(every=2, keep=None),
        "file_log": callbacks.FileLog(every=1),
        "history": callbacks.MetricsHistory(),
        "plot": callbacks.LossPlot(every=4),
        "progress": callbacks.ProgressBar(interval=0),
        "summary": callbacks.RunSummary(),
        "tensorboard": callbacks.TensorBoard(),
        "validation": callbacks.Validation(at_start=True),
    }


@pytest.fixture(scope="session")
def fit(tiny):
    """Trains a tiny model on random tokens; returns the trainer, the callbacks, the printed text and the error."""
    import torch

    from bumblebee.datamodule import DataModule
    from bumblebee.model import Bumblebee
    from bumblebee.optim import Linear
    from bumblebee.tasks.language_modeling import LanguageModeling
    from bumblebee.trainer import Trainer

    class RandomTokens(DataModule):
        def __init__(self, num_validation: int) -> None:
            self.num_validation = num_validation

        def setup(self, seed: int) -> None:
            samples = torch.randint(0, 64, (22 + self.num_validation, 9), generator=torch.Generator().manual_seed(0))
            self.train, self.validation = list(samples[:22]), list(samples[22:])

        def collate(self, samples: list[Any]) -> dict[str, Any]:
            rows = torch.stack(samples)
            inputs, labels = rows[:, :-1], rows[:, 1:].clone()
            return {"input_ids": inputs, "labels": labels, "position_ids": torch.arange(8).expand_as(inputs)}

    def run(
        folder: Path, named: dict[str, Callback | None], num_validation: int = 4, tokenizer: Any = None, **options: Any
    ) -> SimpleNamespace:
        torch.manual_seed(0)
        task = LanguageModeling(Bumblebee(tiny(vocab_size=tokenizer.vocab_size if tokenizer else 64)))
        data = RandomTokens(num_validation)
        data.tokenizer = tokenizer
        trainer = Trainer(**{"max_steps": STEPS, "micro_batch_size": 4, "accumulate": 2, "precision": "fp32", **options})
        optimizer = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
        result = SimpleNamespace(folder=folder, trainer=trainer, callbacks=named, out=io.StringIO(), error=None)
        with redirect_stdout(result.out), redirect_stderr(io.StringIO()):
            try:
                trainer.fit(task, data, optimizer, Linear(warmup_ratio=0.5), named, folder)
            except (RuntimeError, ValueError) as error:
                result.error = error
        result.text = result.out.getvalue()
        return result

    return run


@pytest.fixture(scope="session")
def complete_run(fit, tmp_path_factory):
    """Six steps without interruption."""
    return fit(tmp_path_factory.mktemp("runs") / "complete", all_callbacks())


@pytest.fixture(scope="session")
def crashed_run(fit, tmp_path_factory):
    """The same, failing after step 5; the last line of metrics is truncated as by a kill."""
    run = fit(tmp_path_factory.mktemp("runs") / "crashed", {**all_callbacks(), "fail": FailAfter(5)})
    with (run.folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "los')
    return run


@pytest.fixture(scope="session")
def resumed_run(fit, crashed_run, tmp_path_factory):
    """A copy of ``crashed_run``, resumed from step 4 to the end."""
    folder = tmp_path_factory.mktemp("runs") / "resumed"
    shutil.copytree(crashed_run.folder, folder)
    return fit(folder, all_callbacks(), resume="auto")


@pytest.fixture
def read_lines():
    """Reads JSON Lines."""

    def read(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    return read


def make_checkpoint(folder: Path, step: int, last: bool = False) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "trainer_state.json").write_text(json.dumps({"step": step, "last": last}))
    return path


@pytest.fixture(scope="session")
def scripted():
    """The class ScriptedValidation."""
    return ScriptedValidation


@pytest.fixture(scope="session")
def fail_after():
    """The class FailAfter."""
    return FailAfter


@pytest.fixture(scope="session")
def stop_after():
    """The class StopAfter."""
    return StopAfter


@pytest.fixture
def stub_trainer(tmp_path):
    """Builds a StubTrainer in tmp_path from a list of callbacks; all are closed at the end."""
    trainers = []

    def build(uses: list[Callback], **options: Any) -> StubTrainer:
        trainers.append(StubTrainer(tmp_path, uses, **options))
        return trainers[-1]

    yield build
    for trainer in trainers:
        trainer.close()


@pytest.fixture(name="make_checkpoint")
def make_checkpoint_fixture():
    """Creates a folder that looks like a checkpoint, from (folder, step, last)."""
    return make_checkpoint
