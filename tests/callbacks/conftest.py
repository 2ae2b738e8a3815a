"""Three real runs that the tests of this folder look at, and a trainer without a model for what is pure logic.

``whole`` trains six steps with every callback. ``killed`` is the same run, which fails after its fifth step was logged;
``continued`` goes on from its checkpoint at step 4 to the end.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import callbacks
from bumblebee.callback import Callback
from bumblebee.training.plan import Plan

STEPS, PER_EPOCH = 6, 3


class FailAfter(Callback):
    """Fails when step ``step`` has been logged; before it is saved, if it comes before the one that saves."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, trainer: Any) -> None:
        if trainer.step == self.step:
            raise RuntimeError("the disk is on fire")


class Scripted(Callback):
    """A validation after each step, whose results are given: ``values[0]`` after step 1, and so on; None is no validation."""

    def __init__(self, *values: float | None, metric: str = "validation_loss") -> None:
        self.values, self.metric = values, metric

    def on_step_end(self, trainer: Any) -> None:
        value = self.values[trainer.step - 1] if trainer.step <= len(self.values) else None
        if value is not None:
            trainer.call("on_validation_end", {self.metric: value})


def every_callback() -> dict[str, Callback | None]:
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
    """A function that trains a tiny model on random tokens; gives the trainer, the callbacks and what was printed."""
    import torch

    from bumblebee.datamodule import DataModule
    from bumblebee.model import Bumblebee
    from bumblebee.optim import Linear
    from bumblebee.tasks.language_modeling import LanguageModeling
    from bumblebee.trainer import Trainer

    class RandomTokens(DataModule):
        def __init__(self, held_out: int) -> None:
            self.held_out = held_out

        def setup(self, seed: int) -> None:
            samples = torch.randint(0, 64, (22 + self.held_out, 9), generator=torch.Generator().manual_seed(0))
            self.train, self.validation = list(samples[:22]), list(samples[22:])

        def collate(self, samples: list[Any]) -> dict[str, Any]:
            rows = torch.stack(samples)
            inputs, labels = rows[:, :-1], rows[:, 1:].clone()
            return {"input_ids": inputs, "labels": labels, "position_ids": torch.arange(8).expand_as(inputs)}

    def run(
        folder: Path, uses: dict[str, Callback | None], held_out: int = 4, tokenizer: Any = None, **options: Any
    ) -> SimpleNamespace:
        torch.manual_seed(0)
        task = LanguageModeling(Bumblebee(tiny(vocab_size=tokenizer.vocab_size if tokenizer else 64)))
        data = RandomTokens(held_out)
        data.tokenizer = tokenizer
        trainer = Trainer(**{"max_steps": STEPS, "micro_batch_size": 4, "accumulate": 2, "precision": "fp32", **options})
        optimizer = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
        result = SimpleNamespace(folder=folder, trainer=trainer, callbacks=uses, out=io.StringIO(), error=None)
        with redirect_stdout(result.out), redirect_stderr(io.StringIO()):
            try:
                trainer.fit(task, data, optimizer, Linear(warmup_ratio=0.5), uses, folder)
            except (RuntimeError, ValueError) as error:
                result.error = error
        result.text = result.out.getvalue()
        return result

    return run


@pytest.fixture(scope="session")
def whole(fit, tmp_path_factory):
    """Six steps without interruption."""
    return fit(tmp_path_factory.mktemp("runs") / "whole", every_callback())


@pytest.fixture(scope="session")
def killed(fit, tmp_path_factory):
    """The same, failing after step 5; the last line of metrics is cut as by a kill."""
    run = fit(tmp_path_factory.mktemp("runs") / "killed", {**every_callback(), "fail": FailAfter(5)})
    with (run.folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "los')
    return run


@pytest.fixture(scope="session")
def continued(fit, killed, tmp_path_factory):
    """A copy of ``killed``, trained to the end from step 4."""
    folder = tmp_path_factory.mktemp("runs") / "continued"
    shutil.copytree(killed.folder, folder)
    return fit(folder, every_callback(), resume="auto")


@pytest.fixture
def read_lines():
    """A function that reads JSON Lines."""

    def read(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    return read


class FakeTrainer:
    """Goes through the hooks of a run without a model. ``events`` says what callbacks asked for."""

    def __init__(self, folder: Path, uses: list[Callback], steps: int = STEPS, step: int = 0, is_main: bool = True) -> None:
        self.plan = Plan(samples=22, micro_batch_size=4, accumulate=2, world_size=1, max_steps=steps)
        self.uses, self.step, self.tokens, self.output_dir, self.is_main = uses, step, 0, folder, is_main
        self.should_stop = self.interrupted = False
        self.stop_at: int | None = None
        self.device, self.precision, self.zero_stage, self.seed = SimpleNamespace(type="cpu"), "fp32", 1, 42
        self.data = SimpleNamespace(validation=[1, 2], tokenizer=None)
        self.events: list[tuple[str, int]] = []
        self.logged: dict[str, float] = {}
        self.validation = {"validation_loss": 2.5}
        self.metrics: dict[str, float] = {}

    @cached_property
    def engine(self) -> Any:
        from torch import nn

        return SimpleNamespace(model=nn.Linear(2, 2), train=lambda: None)

    @property
    def task(self) -> Any:
        return SimpleNamespace(model=self.engine.model)

    def run(self) -> FakeTrainer:
        self.call("on_fit_start")
        while self.step < self.plan.max_steps and not self.should_stop:
            self.call("on_step_start")
            self.step += 1
            self.tokens += 100
            self.call("on_step_end")
            self.call("on_log", {"step": self.step, "loss": 2.0 / self.step, "lr": 0.01, **self.metrics})
            self.should_stop = self.should_stop or self.step == self.stop_at
            self.call("on_save")
        self.call("on_fit_end")
        return self

    def call(self, hook: str, *args: Any) -> None:
        for callback in self.uses:
            getattr(callback, hook)(self, *copy.deepcopy(args))

    def validate(self) -> dict[str, float]:
        self.events.append(("validate", self.step))
        self.call("on_validation_end", self.validation)
        return self.validation

    def log(self, name: str, value: float) -> None:
        self.logged[name] = value

    def reduce_sums(self, sums: dict[str, Any]) -> dict[str, float]:
        return {name: float(value) for name, value in sums.items()}

    def save_checkpoint(self, last: bool = False, model: bool = True) -> Path:
        self.events.append(("save last" if last else "save", self.step))
        path = make_checkpoint(self.output_dir, self.step, last)
        self.call("on_checkpoint_saved", path)
        return path


def make_checkpoint(folder: Path, step: int, last: bool = False) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "trainer_state.json").write_text(json.dumps({"step": step, "last": last}))
    return path


@pytest.fixture(scope="session")
def scripted():
    """The class Scripted."""
    return Scripted


@pytest.fixture(scope="session")
def fail_after():
    """The class FailAfter."""
    return FailAfter


@pytest.fixture
def fake(tmp_path):
    """A function that makes a FakeTrainer in tmp_path."""
    return partial(FakeTrainer, tmp_path)


@pytest.fixture
def checkpoint_at():
    """A function (folder, step, last) that makes a folder that looks like a checkpoint."""
    return make_checkpoint
