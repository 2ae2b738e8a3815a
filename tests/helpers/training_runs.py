"""Parts for small real runs: rows of random tokens, a model of 30,000 weights, callbacks that stop, signal, kill or fill disks.

Used by the tests in their own process and, through ``ranks.py``, by several ranks under torchrun.
"""

from __future__ import annotations

import functools
import os
import random
import resource
import shutil
import signal
import tempfile
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import callbacks
from bumblebee import optim
from bumblebee.callback import Callback
from bumblebee.config import BumblebeeConfig
from bumblebee.datamodule import Batch, DataModule
from bumblebee.lora import LoRA
from bumblebee.model import Bumblebee
from bumblebee.models.loading import load_model
from bumblebee.nn import IGNORE_INDEX
from bumblebee.tasks.dpo import DPO
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.tasks.run_context import RunContext
from bumblebee.tokenizer.tokenizer import Tokenizer
from bumblebee.trainer import Trainer
from bumblebee.transforms import Freeze
from datamodules import SFT

VOCABULARY, LENGTH = 64, 16
SMALL: dict[str, Any] = {"max_steps": 6, "micro_batch_size": 2, "accumulate": 2, "precision": "fp32", "device": "cpu"}


class Rows(DataModule):
    """Random rows; sample i has ``targets[i % len(targets)]`` targets, so that their numbers may differ as much as wanted."""

    def __init__(self, samples: int = 22, targets: tuple[int, ...] | list[int] = (16, 1, 7, 0, 12), content: int = 0) -> None:
        self.samples, self.targets, self.content = samples, list(targets), content

    def setup(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(self.content)
        tokens = torch.randint(0, VOCABULARY, (self.samples, LENGTH + 1), generator=generator)
        wanted = torch.tensor([self.targets[i % len(self.targets)] for i in range(self.samples)])
        labels = tokens[:, 1:].masked_fill(torch.arange(LENGTH) < LENGTH - wanted[:, None], IGNORE_INDEX)
        self.train = list(zip(tokens[:, :-1], labels, strict=True))
        self.validation = self.train[:5]

    def collate(self, samples: list[Any]) -> Batch:
        input_ids, labels = (torch.stack(part) for part in zip(*samples, strict=True))
        return {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": torch.arange(LENGTH).expand(len(samples), LENGTH),
        }


class Pairs(DataModule):
    """Random pairs of responses of different lengths; those named in ``empty`` have none. Validation: the first three."""

    def __init__(self, samples: int = 11, empty: tuple[int, ...] | list[int] = (), content: int = 0) -> None:
        self.samples, self.empty, self.content = samples, list(empty), content

    def setup(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(self.content)
        self.train = []
        for index in range(self.samples):
            prompt, *responses = torch.randint(1, 7, (3,), generator=generator).tolist()
            tokens = torch.randint(0, VOCABULARY, (prompt + 12,), generator=generator)
            rows = [
                torch.cat([tokens[:prompt], tokens[at : at + n]]) for at, n in zip((prompt, prompt + 6), responses, strict=True)
            ]
            self.train.append((index, len(tokens) if index in self.empty else prompt, rows))
        self.validation = self.train[:3]

    def collate(self, samples: list[Any]) -> Batch:
        rows = [(prompt, row) for _, prompt, pair in samples for row in pair]
        shape = len(rows), max(len(row) for _, row in rows) - 1
        input_ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX)
        for number, (prompt, row) in enumerate(rows):
            input_ids[number, : len(row) - 1] = row[:-1]
            labels[number, prompt - 1 : len(row) - 1] = row[prompt:]
        positions = torch.arange(shape[1]).expand(shape).clone()
        return {"input_ids": input_ids, "labels": labels, "position_ids": positions,
                "index": torch.tensor([index for index, _, _ in samples])}  # fmt: skip


class Chats(SFT):
    """Conversations of a file, with a tokenizer that is trained on the file itself."""

    def __init__(self, file: str, max_length: int = 256, packing: bool = True) -> None:
        folder = tempfile.mkdtemp()
        Tokenizer.train([Path(file).read_text(encoding="utf-8")], 400).save_pretrained(folder)
        super().__init__(file, folder, max_length, too_long="split", packing=packing)

    def setup(self, seed: int) -> None:
        super().setup(seed)
        shutil.rmtree(self.tokenizer_folder, ignore_errors=True)  # what is mapped stays readable


class Noisy(LanguageModeling):
    """A task that draws from all random generators in each step, as dropout would: a resume has to continue their series."""

    def training_step(self, model: Any, batch: Batch) -> dict[str, torch.Tensor]:
        noise = float(torch.rand(()) + random.random())
        return {name: loss * (0.5 + noise) for name, loss in super().training_step(model, batch).items()}


class PartlyFrozen(LanguageModeling):
    """Everything but the norms is frozen, or what ``patterns`` say."""

    def __init__(self, model: Bumblebee, patterns: tuple[str, ...] = ("proj", "embed")) -> None:
        super().__init__(model, [Freeze(list(patterns))])


class AdaptedDPO(DPO):
    """DPO of LoRA adapters that drop out half of what they see."""

    def __init__(self, model: Bumblebee, **options: Any) -> None:
        model.source = Path("base")  # named in the adapter's folder, not read
        super().__init__(model, [LoRA(rank=4, alpha=32, dropout=0.5)], **options)


class Refused(DPO):
    """A task that finds out late that it cannot be done."""

    def begin(self, run: RunContext, /) -> None:
        raise ValueError("not on this device")


class Recorder(Callback):
    """Keeps all metrics, through a resume as well."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self.metrics.append(metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self.metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.metrics = list(state["metrics"])


class StopAfter(Callback):
    """Ends the run after a step, on one rank's word."""

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step, self.rank = step, rank

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == self.step and int(os.environ.get("RANK", "0")) == self.rank:
            trainer.should_stop = True


class SignalIn(Callback):
    """Sends this process a signal in the middle of a step, on one rank."""

    def __init__(self, step: int, number: int = signal.SIGTERM, rank: int = 0, times: int = 1) -> None:
        self.step, self.number, self.rank, self.times = step, number, rank, times

    def on_step_start(self, trainer: Trainer) -> None:
        if trainer.step == self.step and int(os.environ.get("RANK", "0")) == self.rank:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


class KillIn(Callback):
    """kill -9 between two steps, on one rank, as the system does that runs out of memory."""

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step, self.rank = step, rank

    def on_step_start(self, trainer: Trainer) -> None:
        if trainer.step == self.step and int(os.environ.get("RANK", "0")) == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


class KillInSave(Callback):
    """kill -9 in the middle of a checkpoint: after the shards, before the trainer's own file."""

    def __init__(self, step: int) -> None:
        self.step, self.now = step, 0

    def on_step_end(self, trainer: Trainer) -> None:
        self.now = trainer.step

    def state_dict(self) -> dict[str, Any]:
        if self.now == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}


class FullDisk(Callback):
    """From a step on, one rank cannot write files larger than so many bytes, as on a disk that is nearly full."""

    def __init__(self, step: int, rank: int = 0, size: int = 20_000) -> None:
        self.step, self.rank, self.size = step, rank, size

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == self.step and int(os.environ.get("RANK", "0")) == self.rank:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, hard))


class ReplaceFolder(Callback):
    """After a step the run's folder is a file."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            shutil.rmtree(trainer.output_dir)
            trainer.output_dir.write_text("not a folder")


class Fail(Callback):
    """An error that is nobody's fault but ours, on one rank."""

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step, self.rank = step, rank

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == self.step and int(os.environ.get("RANK", "0")) == self.rank:
            raise RuntimeError("on fire")


def small_model(seed: int = 0, **changes: Any) -> Bumblebee:
    """The model of these tests, always with the same weights."""
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "vocab_size": VOCABULARY}
    torch.manual_seed(seed)
    return Bumblebee(BumblebeeConfig.preset("tiny", **{**shape, **changes}))


def train(folder: str | Path, **job: Any) -> list[dict[str, float]]:
    """Train the small model; returns all lines of metrics. Whatever is not said is the same in all tests.

    Args:
        folder: the run's folder.
        job: in JSON, so that it can be sent to other processes: ``data`` (of Rows, or a class of this file with its
            options), ``model`` (changes of the config), ``base`` (a model folder instead), ``lora`` (options), ``task`` (a
            class of this file, perhaps with its options), ``optimizer`` (of torch.optim, or a class path), ``schedule`` and
            ``callbacks`` (names or classes, with their options), ``seed``, ``overwrite``, ``building`` (build the model as
            the command line does, as is done with a ``base`` in any case); all others are the Trainer's.
    """
    recorder = Recorder()
    parts = {name: job.pop(name, {}) for name in ("data", "model", "callbacks")}
    base, lora = job.pop("base", None), job.pop("lora", None)
    named = job.pop("task", "LanguageModeling")
    kind, task_options = (named, {}) if isinstance(named, str) else named
    if lora is not None:
        task_options = {**task_options, "transforms": [LoRA(**lora)]}
    data_kind, data_options = ("Rows", parts["data"]) if isinstance(parts["data"], dict) else parts["data"]
    named, options = job.pop("optimizer", ("AdamW", {"lr": 1e-2, "weight_decay": 0.1}))
    module, _, name = named.rpartition(".")
    optimizer = functools.partial(getattr(import_module(module or "torch.optim"), name), **options)
    named, options = job.pop("schedule", ("Constant", {"warmup_ratio": 0.0}))
    schedule = getattr(optim, named)(**options)
    others = {name: made(*call) for name, call in parts["callbacks"].items()}
    fit = {"seed": job.pop("seed", 42), "overwrite": job.pop("overwrite", False), "output_dir": folder}
    building = job.pop("building", base is not None)
    trainer = Trainer(**{**SMALL, **job})
    torch.manual_seed(fit["seed"])
    with trainer.building() if building else nullcontext():
        model = load_model(base) if base else small_model(**parts["model"])
        task = globals()[kind](model, **task_options)
    data = globals()[data_kind](**data_options)
    trainer.fit(task, data, optimizer, schedule, {"recorder": recorder, **others}, **fit)
    return recorder.metrics


def made(name: str, options: dict[str, Any]) -> Callback:
    """A callback of this file or of ``callbacks``."""
    return (globals().get(name) or getattr(callbacks, name))(**options)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """``train`` with what can be sent back: {"metrics": ...}, or {"error": ...} where the run was refused."""
    try:
        return {"metrics": train(**job)}
    except ValueError as error:
        return {"error": str(error)}


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a model folder."""
    return load_file(Path(folder) / "model.safetensors")


def adapter_bytes(folder: str | Path) -> bytes:
    """The adapter as it lies on the disk."""
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


def weight_bytes(folder: str | Path) -> bytes:
    """The weights as they lie on the disk."""
    return (Path(folder) / "model.safetensors").read_bytes()
