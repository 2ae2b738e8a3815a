"""Small real training runs: random rows, a model of 30,000 weights, callbacks that stop, signal, kill or fill disks.

Tests call ``train`` in their own process or, through ``run_jobs.py``, on several ranks under torchrun. ``train_reference`` does
the same in plain PyTorch.
"""

from __future__ import annotations

import functools
import json
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
from bumblebee.tasks.distillation import Distillation  # noqa: F401  (named by a job)
from bumblebee.tasks.dpo import DPO
from bumblebee.tasks.grpo import GRPO
from bumblebee.tasks.kto import KTO
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.tasks.reward_model import RewardModel  # noqa: F401  (named by a job)
from bumblebee.tasks.run_context import RunContext
from bumblebee.tokenizer.tokenizer import Tokenizer
from bumblebee.trainer import Trainer
from bumblebee.transforms import Freeze
from bumblebee.verify import reference_loop
from datamodules import SFT, Prompts
from helpers.tool_functions import add

VOCABULARY, LENGTH = 64, 16
LR, WEIGHT_DECAY = 1e-2, 0.1
SMALL: dict[str, Any] = {"max_steps": 6, "micro_batch_size": 2, "accumulate": 2, "precision": "fp32", "device": "cpu"}


class Rows(DataModule):
    """Random rows. Sample i has ``targets[i % len(targets)]`` targets."""

    def __init__(self, samples: int = 22, targets: tuple[int, ...] | list[int] = (16, 1, 7, 0, 12), content: int = 0) -> None:
        self.samples, self.targets, self.content = samples, list(targets), content

    def setup(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(self.content)
        tokens = torch.randint(0, VOCABULARY, (self.samples, LENGTH + 1), generator=generator)
        targets = torch.tensor([self.targets[i % len(self.targets)] for i in range(self.samples)])
        labels = tokens[:, 1:].masked_fill(torch.arange(LENGTH) < LENGTH - targets[:, None], IGNORE_INDEX)
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
    """Random pairs of responses of different lengths; pairs in ``empty`` have no targets. Validation: the first three."""

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


class Labelled(Pairs):
    """Random answers, of which two thirds are good; the second row of each example has the answer of another one."""

    def setup(self, seed: int) -> None:
        super().setup(seed)
        answers = [own[prompt:] for _, prompt, (own, _) in self.train]
        others = [
            next(answer for answer in (answers[at - back] for back in (1, 2, 3)) if len(answer)) for at in range(len(answers))
        ]
        self.train = [
            (index, prompt, [own, torch.cat([own[:prompt], other])])
            for (index, prompt, (own, _)), other in zip(self.train, others, strict=True)
        ]
        self.validation = self.train[:3]

    def collate(self, samples: list[Any]) -> Batch:
        return {**super().collate(samples), "desirable": torch.tensor([index % 3 > 0 for index, _, _ in samples])}


class AdaptedKTO(KTO):
    """KTO of LoRA adapters with a dropout of one half."""

    def __init__(self, model: Bumblebee, **options: Any) -> None:
        model.source = Path("base")  # saved in the adapter's config, never read
        super().__init__(model, [LoRA(rank=4, alpha=32, dropout=0.5)], **options)


class Chats(SFT):
    """Conversations of a file, with a tokenizer trained on that file."""

    def __init__(self, file: str, max_length: int = 256, packing: bool = True) -> None:
        folder = tempfile.mkdtemp()
        Tokenizer.train([Path(file).read_text(encoding="utf-8")], 400).save_pretrained(folder)
        super().__init__(file, folder, max_length, too_long="split", packing=packing)

    def setup(self, seed: int) -> None:
        super().setup(seed)
        shutil.rmtree(self.tokenizer_folder, ignore_errors=True)  # mapped files stay readable


class Questions(Prompts):
    """Additions, with a tokenizer trained on them. Four of them are held out."""

    def __init__(self, samples: int = 11) -> None:
        self.folder = tempfile.mkdtemp()
        lines = [json.dumps({"prompt": f"{a} + {a * 3}?", "answer": 4 * a}) for a in range(samples)]
        Path(self.folder, "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
        Path(self.folder, "held_out.jsonl").write_text("\n".join(lines[:4]), encoding="utf-8")
        Tokenizer.train(lines, 300).save_pretrained(self.folder)
        super().__init__(f"{self.folder}/questions.jsonl", self.folder, validation_files=f"{self.folder}/held_out.jsonl")

    def setup(self, seed: int) -> None:
        super().setup(seed)
        shutil.rmtree(self.folder, ignore_errors=True)


class ToolQuestions(Questions):
    """Additions, with a chat template that takes few tokens."""

    def __init__(self, samples: int = 11) -> None:
        super().__init__(samples)
        self.chat_template = f"{self.folder}/short.jinja"
        Path(self.chat_template).write_text(SHORT_TEMPLATE, encoding="utf-8")


SHORT_TEMPLATE = """
{%- for tool in tools or [] %}{{ tool.function.name }}{% endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role[0] + '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<c>{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}</c>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{{- '<|im_start|>a\\n' if add_generation_prompt }}
"""


def odd_characters(prompts: list[str], completions: list[str], records: list[Any]) -> list[float]:
    """A reward that differs between completions of a model with random weights."""
    return [sum(ord(character) % 2 for character in text) / 4 for text in completions]


class RewardedGRPO(GRPO):
    """GRPO of short completions, rewarded by ``odd_characters``."""

    def __init__(self, model: Bumblebee, **options: Any) -> None:
        super().__init__(model, [odd_characters], **{"group_size": 3, "max_new_tokens": 5, **options})


class UnevenGRPO(RewardedGRPO):
    """Rank 1 samples shorter completions. The metric ``held_blocks``: blocks whose weights a rank holds while it samples."""

    def __init__(self, model: Bumblebee, **options: Any) -> None:
        super().__init__(model, **options)
        self.sampler.max_new_tokens -= 3 * int(os.environ.get("RANK", "0"))
        self.held: set[int] = set()
        for block in model.blocks:
            block.register_forward_hook(self._count_held)

    def _count_held(self, *_: object) -> None:
        if torch.is_inference_mode_enabled():  # as in sampling only
            held = sum(any(parameter.numel() for parameter in block.parameters()) for block in self.model.blocks)
            assert self.sampler.gathering is not None and (held == 1 or not self.sampler.gathering.layers)
            self.held.add(held)

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), "held_blocks": max(self.held, default=0)}


def odd_questions_only(prompts: list[str], completions: list[str], records: list[Any]) -> list[float]:
    """``odd_characters``, but 0 for every second question."""
    rewards = odd_characters(prompts, completions, records)
    return [reward * (record["answer"] // 4 % 2) for reward, record in zip(rewards, records, strict=True)]


class PartlyRewardedGRPO(GRPO):
    """GRPO of short completions, rewarded by ``odd_questions_only``."""

    def __init__(self, model: Bumblebee, **options: Any) -> None:
        super().__init__(model, [odd_questions_only], **{"group_size": 3, "max_new_tokens": 5, **options})


def longer_is_better(prompts: list[str], completions: list[str], records: list[Any]) -> list[float]:
    """The number of characters."""
    return [float(len(text)) for text in completions]


class ToolGRPO(GRPO):
    """GRPO of completions that may call ``helpers.tool_functions.add``."""

    def __init__(self, model: Bumblebee, **options: Any) -> None:
        defaults = {"group_size": 3, "max_new_tokens": 60, "tools": [add], "tool_timeout": None, "max_turns": 3}
        super().__init__(model, [longer_is_better], **{**defaults, **options})


class Noisy(LanguageModeling):
    """Draws from all random generators in each step, as dropout does: a resumed run must restore them."""

    def training_step(self, model: Any, batch: Batch) -> dict[str, torch.Tensor]:
        noise = float(torch.rand(()) + random.random())
        return {name: loss * (0.5 + noise) for name, loss in super().training_step(model, batch).items()}


class PartlyFrozen(LanguageModeling):
    """Everything but the norms is frozen, or the parameters that match ``patterns``."""

    def __init__(self, model: Bumblebee, patterns: tuple[str, ...] = ("proj", "embed")) -> None:
        super().__init__(model, [Freeze(list(patterns))])


class BlockUsedTwice(LanguageModeling):
    """The model's second block is its first one again."""

    def __init__(self, model: Bumblebee) -> None:
        model.model.layers[1] = model.model.layers[0]
        super().__init__(model)


class AdaptedDPO(DPO):
    """DPO of LoRA adapters with a dropout of one half."""

    def __init__(self, model: Bumblebee, **options: Any) -> None:
        model.source = Path("base")  # saved in the adapter's config, never read
        super().__init__(model, [LoRA(rank=4, alpha=32, dropout=0.5)], **options)


class Refused(DPO):
    """A task that fails once the engine exists."""

    def begin(self, run: RunContext, /) -> None:
        raise ValueError("not on this device")


class Recorder(Callback):
    """Keeps all metrics, across resumes."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self.metrics.append(metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self.metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.metrics = list(state["metrics"])


class LogOnce(Callback):
    """Logs the metric "extra" in one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            trainer.log("extra", 1.5)


class StopAfter(Callback):
    """Stops the run after a step, requested by one rank."""

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
    """kill -9 between two steps, on one rank, as by the out-of-memory killer."""

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step, self.rank = step, rank

    def on_step_start(self, trainer: Trainer) -> None:
        if trainer.step == self.step and int(os.environ.get("RANK", "0")) == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


class KillInSave(Callback):
    """kill -9 while a checkpoint is written: after the shards, before trainer_state.json."""

    def __init__(self, step: int) -> None:
        self.step, self.now = step, 0

    def on_step_end(self, trainer: Trainer) -> None:
        self.now = trainer.step

    def state_dict(self) -> dict[str, Any]:
        if self.now == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}


class FullDisk(Callback):
    """After a step, one rank cannot write files above a size, as on a full disk."""

    def __init__(self, step: int, rank: int = 0, size: int = 20_000) -> None:
        self.step, self.rank, self.size = step, rank, size

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == self.step and int(os.environ.get("RANK", "0")) == self.rank:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, hard))


class _NonFiniteGradient(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * float("nan")


class PoisonGradient(Callback):
    """The gradient of some steps is NaN and their loss is finite, as an attention kernel may do: on one rank."""

    def __init__(self, steps: list[int], rank: int = 0) -> None:
        self.steps, self.rank = steps, rank

    def on_fit_start(self, trainer: Trainer) -> None:
        training_step = trainer.task.training_step

        def poisoned(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
            losses = training_step(model, batch)
            if trainer.step + 1 not in self.steps or int(os.environ.get("RANK", "0")) != self.rank:
                return losses
            return {name: _NonFiniteGradient.apply(loss) for name, loss in losses.items()}

        trainer.task.training_step = poisoned  # type: ignore[method-assign]


class ReplaceFolder(Callback):
    """Replace the output folder by a file after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            shutil.rmtree(trainer.output_dir)
            trainer.output_dir.write_text("not a folder")


class Fail(Callback):
    """Raise an unexpected error on one rank."""

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step, self.rank = step, rank

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == self.step and int(os.environ.get("RANK", "0")) == self.rank:
            raise RuntimeError("on fire")


def small_model(seed: int = 0, **changes: Any) -> Bumblebee:
    """The model of these tests, with the same weights for the same seed."""
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "vocab_size": VOCABULARY}
    torch.manual_seed(seed)
    return Bumblebee(BumblebeeConfig.preset("tiny", **{**shape, **changes}))


def train(folder: str | Path, **job: Any) -> list[dict[str, float]]:
    """Train the small model; returns all lines of metrics.

    Args:
        folder: the run's folder.
        job: JSON values, so that a job can be sent to other processes: ``data`` (options of Rows, or a class of this file
            with its options), ``model`` (config overrides), ``base`` (a model folder instead), ``lora`` (options), ``task``
            (a class of this file, optionally with options), ``optimizer`` (of torch.optim, or a class path), ``schedule`` and
            ``callbacks`` (names with their options), ``seed``, ``overwrite``, ``building`` (build the model as the command
            line does; implied by ``base``); all others are options of the Trainer.
    """
    recorder = Recorder()
    parts = {name: job.pop(name, {}) for name in ("data", "model", "callbacks")}
    base, lora = job.pop("base", None), job.pop("lora", None)
    task_name = job.pop("task", "LanguageModeling")
    task_name, task_options = (task_name, {}) if isinstance(task_name, str) else task_name
    if lora is not None:
        task_options = {**task_options, "transforms": [LoRA(**lora)]}
    data_name, data_options = ("Rows", parts["data"]) if isinstance(parts["data"], dict) else parts["data"]
    path, options = job.pop("optimizer", ("AdamW", {"lr": LR, "weight_decay": WEIGHT_DECAY}))
    module, _, name = path.rpartition(".")
    optimizer = functools.partial(getattr(import_module(module or "torch.optim"), name), **options)
    schedule_name, options = job.pop("schedule", ("Constant", {"warmup_ratio": 0.0}))
    schedule = getattr(optim, schedule_name)(**options)
    more_callbacks = {name: make_callback(*call) for name, call in parts["callbacks"].items()}
    fit = {"seed": job.pop("seed", 42), "overwrite": job.pop("overwrite", False), "output_dir": folder}
    building = job.pop("building", base is not None)
    trainer = Trainer(**{**SMALL, **job})
    torch.manual_seed(fit["seed"])
    with trainer.building() if building else nullcontext():
        model = load_model(base) if base else small_model(**parts["model"])
        task = globals()[task_name](model, **task_options)
    data = globals()[data_name](**data_options)
    trainer.fit(task, data, optimizer, schedule, {"recorder": recorder, **more_callbacks}, **fit)
    return recorder.metrics


def train_reference(
    rows: Rows,
    per_step: int,
    steps: int,
    schedule: optim.Schedule,
    clip: float,
    dtype: torch.dtype = torch.float32,
    **model_changes: Any,
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Train the small model with the reference loop; returns loss and grad_norm of each step with targets, and the weights."""
    rows.setup(0)
    model = small_model(**model_changes).to(dtype)
    indices = reference_loop.sample_indices(len(rows.train), per_step, steps, seed=42)
    batches = [rows.collate([rows.train[index] for index in of_step]) for of_step in indices]
    metrics = reference_loop.train_adamw(model, batches, LR, WEIGHT_DECAY, clip, lambda step: schedule.factor(step, steps))
    return [line._asdict() for line in metrics], {name: tensor.detach() for name, tensor in model.named_parameters()}


def reference_gradient(rows: Rows, **model_changes: Any) -> dict[str, torch.Tensor]:
    """Gradient of the mean loss over all targets of all rows, from the reference loop."""
    rows.setup(0)
    return reference_loop.gradient(small_model(**model_changes), rows.collate(rows.train))


def make_callback(name: str, options: dict[str, Any]) -> Callback:
    """Build a callback of this file or of ``callbacks``."""
    return (globals().get(name) or getattr(callbacks, name))(**options)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """``train`` with a JSON result: {"metrics": ...}, or {"error": ...} if the run was refused."""
    try:
        return {"metrics": train(**job)}
    except ValueError as error:
        return {"error": str(error)}


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a model folder."""
    return load_file(Path(folder) / "model.safetensors")


def adapter_bytes(folder: str | Path) -> bytes:
    """The bytes of the adapter file."""
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


def weight_bytes(folder: str | Path) -> bytes:
    """The bytes of the weight file."""
    return (Path(folder) / "model.safetensors").read_bytes()
