"""Trainer: the loop. ``run`` reads top to bottom; everything that is not forward, backward, step is a callback.

The trainer owns how things are done (a step, a validation, a checkpoint); callbacks own when. torch is imported when a run is
set up, so that the command line knows the options without it.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bumblebee.callback import Callback
from bumblebee.datamodule import Batch, DataModule
from bumblebee.distributed import process_group
from bumblebee.json_files import write_json
from bumblebee.optim import Constant, GroupRule, Optimizer, Schedule, parameter_groups, set_learning_rate
from bumblebee.signals import stopped_by_signals
from bumblebee.tasks.task import Task
from bumblebee.training.plan import Plan, Position
from bumblebee.training.run_folder import TRAINER_STATE, check_free, clear, find_resume, read_trainer_state

if not TYPE_CHECKING:
    pass  # this way round, since the command line's parser executes what stands under "if TYPE_CHECKING", torch and all
else:
    import torch
    from torch import nn

    from bumblebee.distributed.deepspeed.ds_config import EngineOptions
    from bumblebee.distributed.deepspeed.engine import TrainingEngine
    from bumblebee.distributed.deepspeed.frozen_engine import FrozenEngine


class Trainer:
    """Trains a task.

    Args:
        max_steps: optimizer steps; None means as many as ``epochs`` take.
        epochs: passes over the data, fractions allowed.
        micro_batch_size: samples of one forward pass on one device.
        accumulate: forward passes of each device per optimizer step.
        precision: bf16, fp16 (on a GPU) or fp32.
        zero_stage: DeepSpeed's ZeRO stage, 0 to 3.
        deepspeed: more DeepSpeed configuration: a dict, or the path of a JSON file.
        gradient_clip: largest norm of a step's gradient; null for none.
        log_every: steps between two lines of metrics.
        resume: "auto" for the newest checkpoint in output_dir if there is one, or a checkpoint's path.
        device: auto, cpu, cuda or cuda:N.
        workers: processes that prepare batches, for each rank.
        groups: learning rate and weight decay of parameters by name; the first rule that matches counts.

    Raises:
        ValueError: a number out of its range.
    """

    # The state of a run, set by ``setup``; callbacks read it.
    task: Task
    data: DataModule
    engine: TrainingEngine
    plan: Plan
    callbacks: dict[str, Callback]
    output_dir: Path
    device: torch.device
    step: int  # optimizer steps done
    tokens: int  # targets trained on, over all ranks
    learning_rate: float
    started: bool  # all callbacks have started: from here on it is training
    should_stop: bool  # written by callbacks: end the run after this step
    interrupted: bool  # a signal ended the run
    _signalled: bool
    _finished: bool
    _windows: Iterator[list[Batch]]
    _sums: dict[str, Any]  # what training steps gave since the last line of metrics; on the device
    _target_counts: dict[str, float]
    _recent: list[tuple[int, int, torch.Tensor]]  # (step, micro-batch, its loss) since the last look at them
    _extra_metrics: dict[str, float]
    _frozen: list[FrozenEngine]

    def __init__(
        self,
        max_steps: int | None = None,
        epochs: float = 3.0,
        micro_batch_size: int = 4,
        accumulate: int = 8,
        precision: Literal["fp32", "bf16", "fp16"] = "bf16",
        zero_stage: Literal[0, 1, 2, 3] = 1,
        deepspeed: dict[str, Any] | str | None = None,
        gradient_clip: float | None = 1.0,
        log_every: int = 1,
        resume: str | None = None,
        device: str = "auto",
        workers: int = 0,
        groups: list[GroupRule] | None = None,
    ) -> None:
        for name, value, least in (
            ("max_steps", max_steps, 1), ("micro_batch_size", micro_batch_size, 1), ("accumulate", accumulate, 1),
            ("log_every", log_every, 1), ("workers", workers, 0),
        ):  # fmt: skip
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not epochs > 0:
            raise ValueError(f"epochs must be more than 0, got {epochs}")
        if gradient_clip is not None and not gradient_clip > 0:
            raise ValueError(f"gradient_clip must be more than 0, got {gradient_clip}; null turns clipping off")
        self.max_steps, self.epochs = max_steps, epochs
        self.micro_batch_size, self.accumulate = micro_batch_size, accumulate
        self.precision, self.zero_stage = precision, zero_stage
        self.deepspeed, self.gradient_clip = deepspeed, gradient_clip
        self.log_every, self.resume, self.workers = log_every, resume, workers
        self.device_name, self.groups = device, groups or []

    def fit(
        self,
        task: Task,
        data: DataModule,
        optimizer: Callable[[Iterable], Optimizer],
        schedule: Schedule | None = None,
        callbacks: dict[str, Callback | None] | None = None,
        output_dir: str | Path = "runs/fit",
        seed: int = 42,
        overwrite: bool = False,
    ) -> None:
        """Train. ``setup`` and ``run``, for a program of one's own.

        Args:
            task: model and loss.
            data: batches.
            optimizer: from parameter groups to an optimizer, such as ``functools.partial(torch.optim.AdamW, lr=1e-3)``.
            schedule: of the learning rate; None keeps it constant.
            callbacks: by name; their state is kept in checkpoints under it.
            output_dir: the run's folder.
            seed: of the data's order and of random numbers in training.
            overwrite: delete an earlier run in output_dir.

        Raises:
            ValueError: data, folder or options that cannot be used; nothing has been written then.
        """
        try:
            self.setup(task, data, optimizer, schedule, callbacks, output_dir, seed, overwrite)
            self.run()
        finally:
            self.close()

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train what ``setup`` has prepared, to the end or until asked to stop."""
        with stopped_by_signals(self._interrupt):
            try:
                self.call("on_fit_start")
                self.started = True
                stopping = self.agree_on_stopping()
                while self.step < self.plan.max_steps and not stopping:
                    self.call("on_step_start")
                    self.train_step(next(self._windows))
                    self.step += 1
                    self.call("on_step_end")  # validation runs here
                    if self.step % self.log_every == 0 or self.step == self.plan.max_steps:
                        self.call("on_log", self.flush_metrics())  # reduced over ranks, once
                    stopping = self.agree_on_stopping()
                    self.call("on_save")  # everything above is final
                if not self.interrupted:
                    self.save_model(self.output_dir)
                self.call("on_fit_end")
                self._finished = True
            except BaseException as error:
                self.call("on_exception", error)
                raise

    def train_step(self, window: list[Batch]) -> None:
        """One optimizer step on this rank's micro-batches. A window without any target on any rank changes nothing."""
        counts = self.count_targets(window)
        self.learning_rate = set_learning_rate(
            self.engine.parameter_groups, self.schedule.factor(self.step, self.plan.max_steps)
        )
        if not any(counts.values()):
            return
        for turn, batch in enumerate(window):
            sums = self.task.all_losses(self.engine, self.to_device(batch))  # losses, and what is only logged
            total = self.task.total(sums, counts)
            # DeepSpeed averages gradients over ranks; the counts are already those of all ranks.
            self.engine.backward(total * self.plan.world_size)
            self._recent.append((self.step, turn, total.detach()))
            for name, value in sums.items():
                self._sums[name] = self._sums.get(name, 0.0) + value.detach()  # stays on the device
        self.engine.step()
        self.task.after_step()
        for name, count in counts.items():
            self._target_counts[name] = self._target_counts.get(name, 0) + count
        self.tokens += self.task.tokens(counts)

    def _interrupt(self) -> None:
        self._signalled = True

    def agree_on_stopping(self) -> bool:
        """Whether any rank was asked to stop, by a callback or a signal: they reach the ranks at different moments."""
        flags = self.reduce_sums({"stop": self.should_stop or self._signalled, "interrupt": self._signalled})
        self.should_stop, self.interrupted = flags["stop"] > 0, flags["interrupt"] > 0
        return self.should_stop

    def count_targets(self, window: list[Batch]) -> dict[str, float]:
        """For each loss term its targets over micro-batches and ranks."""
        totals: dict[str, int] = {}
        for batch in window:
            for name, count in self.task.all_counts(batch).items():
                totals[name] = totals.get(name, 0) + int(count)
        return self.reduce_sums(totals)

    def check_finite(self) -> None:
        """Refuse to go on with a loss that is no number. Looked at before metrics are shown and before anything is saved.

        Raises:
            FloatingPointError: on the rank that had it, with the step and the records of the micro-batch.
            OtherRankFailed: on the others.
        """
        bad = next(((step, turn) for step, turn, loss in self._recent if not math.isfinite(loss)), None)
        self._recent = []
        if not process_group.any_rank(bad is not None, self.device):
            return
        if bad is None:
            raise process_group.OtherRankFailed("another rank had a loss that is no number")
        step, turn = bad
        records = self._loader.records(self.data, self.plan.window(step, process_group.rank())[turn], self.seed)
        raise FloatingPointError(
            f"step {step + 1}: the loss is not finite. The micro-batch came from {', '.join(records)}."
            " Nothing has been saved since; continue from the last checkpoint with other data or a lower learning rate"
        )

    def validate(self) -> dict[str, float]:
        """The task's validation metrics over all held-out samples; calls ``on_validation_end``. Collective."""
        from bumblebee.training.validation import validation_sums

        self.engine.eval()
        batches = self._loader.validation_batches(self.data, self.micro_batch_size, process_group.rank(), self.plan.world_size)
        sums = validation_sums(self.task, self.engine, map(self.to_device, batches))
        self.engine.train()
        metrics = self.task.validation_metrics(self.reduce_sums(sums))
        self.schedule.observe(metrics)
        self.call("on_validation_end", metrics)
        return metrics

    # -- metrics -------------------------------------------------------------------------------------------------------

    def log(self, name: str, value: float) -> None:
        """Add a number to the next line of metrics; the same on every rank, or only rank 0's is seen."""
        self._extra_metrics[name] = value

    def flush_metrics(self) -> dict[str, float]:
        """The line of metrics since the last one: each sum of the task over its count, over ranks and steps."""
        self.check_finite()
        sums = self.reduce_sums({name: float(value) for name, value in self._sums.items()})
        units = self.task.units
        terms = {name: value / max(self._target_counts[units.get(name, name)], 1) for name, value in sums.items()}
        metrics: dict[str, float] = {"step": self.step, "epoch": round(self.plan.epoch(self.step), 6)}
        if terms:
            # The task's own: what the model adds stands beside it.
            metrics["loss"] = sum(weight * terms[name] for name, weight in self.task.weights.items() if name in terms)
            metrics.update((name, value) for name, value in terms.items() if name != "loss")
            metrics.update(grad_norm=self.engine.gradient_norm(), **self.engine.loss_scale())
        metrics.update(lr=self.learning_rate, tokens=self.tokens, **self.task.metrics(), **self._extra_metrics)
        self._sums, self._target_counts, self._extra_metrics = {}, {}, {}
        return metrics

    def reduce_sums(self, sums: dict[str, Any]) -> dict[str, float]:
        """Add named numbers over ranks, exactly for whole numbers. Collective; the GPU is waited for."""
        import torch

        vector = torch.tensor([float(value) for value in sums.values()], dtype=torch.float64, device=self.device)
        return dict(zip(sums, process_group.all_reduce_sum(vector).tolist(), strict=True))

    # -- setting up ----------------------------------------------------------------------------------------------------

    @contextmanager
    def building(self) -> Iterator[None]:
        """Build the model inside this context: at stage 3 no rank then holds the whole model; elsewhere nothing changes."""
        if self.zero_stage < 3:
            yield
            return
        from bumblebee.distributed.deepspeed.zero_init import sharded_init

        device = process_group.pick_device(self.device_name)
        process_group.start(device)
        with sharded_init(device, self.engine_options(None)):
            yield

    def engine_options(self, hidden_size: int | None) -> EngineOptions:
        """What decides how DeepSpeed runs a model of this hidden size."""
        from bumblebee.distributed.deepspeed.ds_config import EngineOptions, read_overrides

        overrides = read_overrides(self.deepspeed)
        return EngineOptions(self.precision, self.zero_stage, self.micro_batch_size, self.gradient_clip, overrides, hidden_size)

    def setup(
        self,
        task: Task,
        data: DataModule,
        optimizer: Callable[[Iterable], Optimizer],
        schedule: Schedule | None = None,
        callbacks: dict[str, Callback | None] | None = None,
        output_dir: str | Path = "runs/fit",
        seed: int = 42,
        overwrite: bool = False,
    ) -> None:
        """Prepare everything a run needs; see ``fit`` for the arguments. The folder is touched last.

        Raises:
            ValueError: data, folder or options that cannot be used; nothing has been written then.
        """
        # All of it now: a run of days must not meet edited files at its end.
        import bumblebee.checkpoint.hf_folder
        import bumblebee.training.training_state  # noqa: F401
        import bumblebee.training.validation
        from bumblebee.distributed.deepspeed.engine import TrainingEngine
        from bumblebee.training import loader

        self._loader = loader
        self.task, self.data, self.schedule = task, data, schedule or Constant(warmup_ratio=0.0)
        self.callbacks = {name: callback for name, callback in (callbacks or {}).items() if callback is not None}
        self.output_dir, self.seed = Path(output_dir), seed
        self.step = self.tokens = 0
        self.started = self.should_stop = self.interrupted = self._signalled = self._finished = False
        self.learning_rate = 0.0
        self._sums, self._target_counts, self._extra_metrics = {}, {}, {}
        self._recent, self._frozen = [], []

        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {seed}")
        check_free(self.output_dir, self.resume, overwrite)
        bumblebee.checkpoint.hf_folder.files_of(task.model).check_output(self.output_dir)
        checkpoint = find_resume(self.resume, self.output_dir)
        self.device = process_group.pick_device(self.device_name)
        process_group.start(self.device)
        data.setup(seed)
        task.setup(data)
        self.plan = self.plan_for(data, seed, process_group.world_size(), checkpoint)
        options = self.engine_options(getattr(getattr(task.model, "config", None), "hidden_size", None))
        self.engine = TrainingEngine(task.model, optimizer, parameter_groups(task.model, self.groups), self.device, options)
        task.begin(self)
        self.engine.train()
        self._seed_everything(seed + process_group.rank())
        if checkpoint is not None:
            self.load_checkpoint(checkpoint)
        self._open_folder(overwrite)
        self._windows = loader.train_windows(
            data, self.plan, seed, process_group.rank(), self.step, self.workers, pin_memory=self.device.type == "cuda"
        )

    def plan_for(self, data: DataModule, seed: int, ranks: int, checkpoint: Path | None) -> Plan:
        """Which samples each step uses, from the beginning or from where a checkpoint's run was.

        Raises:
            ValueError: there is nothing to train on, or the checkpoint's run had other data.
        """
        origin = Position() if checkpoint is None else self._resumed_position(checkpoint, data, seed)
        samples = len(data.train)
        return Plan.of(samples, self.micro_batch_size, self.accumulate, ranks, self.epochs, self.max_steps, origin)

    def _open_folder(self, overwrite: bool) -> None:
        process_group.barrier()  # all have looked at the folder before anyone changes it
        error: OSError | None = None
        if self.is_main:
            try:
                if overwrite and self.resume is None:
                    clear(self.output_dir)
                self.output_dir.mkdir(parents=True, exist_ok=True)
                for partial in self.output_dir.glob(".*.partial"):  # of a run that was killed while it saved
                    shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
            except OSError as failure:
                error = failure
        if process_group.any_rank(error is not None, self.device):
            if error is None:
                raise process_group.OtherRankFailed("the first rank cannot write to output_dir")
            raise ValueError(f"output_dir: cannot write to {self.output_dir}: {error.strerror}") from error

    @staticmethod
    def _seed_everything(seed: int) -> None:
        import numpy
        import torch

        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed % 2**32)

    def frozen(self, model: nn.Module) -> FrozenEngine:
        """Another model beside the one that is trained, to be called only. Collective.

        It runs on the run's device in the run's precision, at stage 3 in shards. It may be a deep copy of the task's model
        from before there was an engine.
        """
        from bumblebee.distributed.deepspeed.frozen_engine import FrozenEngine

        options = self.engine_options(getattr(getattr(model, "config", None), "hidden_size", None))
        self._frozen.append(FrozenEngine(model, self.device, options, copy_of=self.engine.model))
        return self._frozen[-1]

    def close(self) -> None:
        """Give back the process group and DeepSpeed's memory. Call it however the run ended."""
        for frozen in self.__dict__.pop("_frozen", []):
            frozen.close()
        if engine := self.__dict__.pop("engine", None):
            engine.close()
        process_group.stop(orderly=self.__dict__.get("_finished", False))

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save_checkpoint(self, last: bool = False, model: bool = True) -> Path:
        """Write ``output_dir/checkpoint-<step>``: a model folder with the training state. Collective; complete or absent.

        Args:
            last: the run ends here; the checkpoint is then outside the rotation.
            model: write the weights as a model folder too. Without it nothing is gathered; ``bumblebee consolidate`` makes
                the model folder from the training state.

        Raises:
            OSError: it could not be written; nothing of it is left, and earlier checkpoints are as they were.
        """
        from bumblebee.training.training_state import save_random_state, written_together

        self.check_finite()
        path = self.output_dir / f"checkpoint-{self.step}"
        with written_together(path, self.device, whole=True) as aside:
            self._write_model(aside, weights=model)
            (aside / "training_state").mkdir(exist_ok=True)
            self.engine.save(aside / "training_state")
            save_random_state(aside / "training_state", process_group.rank())
            if self.is_main:
                write_json(aside / TRAINER_STATE, self._trainer_state(last))
        self.call("on_checkpoint_saved", path)
        return path

    def load_checkpoint(self, path: Path) -> None:
        """Continue from a checkpoint: model, optimizer, random numbers, schedule, callbacks. Collective.

        The run that wrote it may have had other ranks, another ZeRO stage or precision. With the same ones it is as if the run
        had never stopped, to the last bit.
        """
        from bumblebee.checkpoint.hf_folder import files_of
        from bumblebee.training.training_state import load_random_state

        state = read_trainer_state(path)
        files_of(self.task.model).check_resumed(path)
        self.engine.load(path / "training_state")
        load_random_state(path / "training_state", process_group.rank())
        self.step, self.tokens = self.plan.origin.step, state["tokens"]
        self.engine.load_scaler_state(state["loss_scaler"])
        self.schedule.load_state_dict(state["schedule"])
        for name, callback in self.callbacks.items():
            if name in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][name])

    @staticmethod
    def _resumed_position(checkpoint: Path, data: DataModule, seed: int) -> Position:
        """Where in the data a checkpoint's run was.

        Raises:
            ValueError: its data had another order or another size, so that its position means nothing here.
        """
        state = read_trainer_state(checkpoint)
        for name, value in {"seed": seed, "samples": len(data.train)}.items():
            if state[name] != value:
                raise ValueError(f"trainer.resume: {checkpoint} was trained with {name} {state[name]}, this run has {value}")
        return Position(**state["position"])

    def save_model(self, folder: Path) -> None:
        """Write the model folder: weights in the training precision, config, tokenizer. Collective."""
        from bumblebee.training.training_state import written_together

        with written_together(folder, self.device) as aside:
            self._write_model(aside)

    def _write_model(self, folder: Path, weights: bool = True) -> None:
        from bumblebee.checkpoint.hf_folder import files_of

        files = files_of(self.task.model)
        # The training state knows what is trained alone: what else a folder holds has to be written now.
        weights = weights or any(files.holds(n) and not p.requires_grad for n, p in self.engine.model.named_parameters())
        tensors = self.engine.full_tensors(files.holds) if weights else iter(())
        try:
            if self.is_main:
                if weights:
                    files.write(folder, tensors)
                else:
                    files.write_configs(folder, self.engine.dtype)
                if self.data.tokenizer is not None:
                    self.data.tokenizer.save_pretrained(folder)
        finally:
            for _ in tensors:  # every rank takes part in gathering every tensor, also when writing failed
                pass

    def _trainer_state(self, last: bool) -> dict[str, Any]:
        return {
            "position": asdict(self.plan.position(self.step)),
            "seed": self.seed,
            "samples": self.plan.samples,
            "tokens": self.tokens,
            "last": last,
            "ranks": self.plan.world_size,
            "zero_stage": self.zero_stage,
            "precision": self.precision,
            "dtype": self.engine.dtype,
            "loss_scaler": self.engine.scaler_state(),
            "schedule": self.schedule.state_dict(),
            "callbacks": {name: callback.state_dict() for name, callback in self.callbacks.items()},
        }

    # -- small things --------------------------------------------------------------------------------------------------

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that speaks and writes."""
        return process_group.is_main()

    def call(self, hook: str, *args: Any) -> None:
        """Call a hook of every callback."""
        for callback in self.callbacks.values():
            getattr(callback, hook)(self, *args)

    def to_device(self, batch: Batch) -> Batch:
        """A batch on the run's device."""
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
