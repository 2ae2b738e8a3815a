"""Trainer: the training loop. Everything that is not forward, backward, step is a callback.

Read ``run`` and ``train_step`` first. The trainer owns how things are done (a step, a validation, a checkpoint); callbacks own
when. Set-up and checkpoints are in ``training/setup.py`` and ``training/checkpointing.py``, which are imported late: the
command line reads the options of this module without importing torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from bumblebee.callback import Callback
from bumblebee.datamodule import Batch, DataModule
from bumblebee.distributed import process_group
from bumblebee.optim import GroupRule, Optimizer, Schedule, set_learning_rate
from bumblebee.rl.sampled_text import SampledText
from bumblebee.tasks.task import Task
from bumblebee.training.run_state import RunState
from bumblebee.utils.signals import stop_on_signals


class Trainer(RunState):
    """Trains a task. Its state while it runs: see ``training/run_state.py``.

    Args:
        max_steps: number of optimizer steps; null for as many as ``epochs`` take.
        epochs: passes over the data; may be fractional.
        micro_batch_size: samples per forward pass on each device.
        accumulate: forward passes per optimizer step on each device (gradient accumulation).
        precision: bf16, fp16 (on a GPU) or fp32.
        zero_stage: DeepSpeed's ZeRO stage, 0 to 3; null for that of ``deepspeed``, or 1.
        deepspeed: further DeepSpeed configuration: a dict, or the path of a JSON file.
        gradient_clip: maximum gradient norm; null turns clipping off.
        max_skipped_steps: number of steps in a row with a NaN or infinite gradient, each skipped, that ends the run.
        log_every: steps between two lines of metrics.
        resume: "auto" for the newest checkpoint in output_dir if there is one, or a checkpoint's path.
        device: auto, cpu, cuda or cuda:N.
        workers: processes that prepare batches, for each rank.
        groups: learning rate and weight decay of parameters by name; the first matching rule applies.

    Raises:
        ValueError: a number out of range, or zero_stage and the stage in ``deepspeed`` differ.
    """

    def __init__(
        self,
        max_steps: int | None = None,
        epochs: float = 3.0,
        micro_batch_size: int = 4,
        accumulate: int = 8,
        precision: Literal["fp32", "bf16", "fp16"] = "bf16",
        zero_stage: Literal[0, 1, 2, 3] | None = None,
        deepspeed: dict[str, Any] | str | None = None,
        gradient_clip: float | None = 1.0,
        max_skipped_steps: int = 10,
        log_every: int = 1,
        resume: str | None = None,
        device: str = "auto",
        workers: int = 0,
        groups: list[GroupRule] | None = None,
    ) -> None:
        from bumblebee.distributed.deepspeed.ds_config import resolve_stage

        at_least_1 = {"max_steps": max_steps, "micro_batch_size": micro_batch_size, "accumulate": accumulate}
        for name, value in {**at_least_1, "max_skipped_steps": max_skipped_steps, "log_every": log_every}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}")
        if not epochs > 0:
            raise ValueError(f"epochs must be more than 0, got {epochs}")
        if gradient_clip is not None and not gradient_clip > 0:
            raise ValueError(f"gradient_clip must be more than 0, got {gradient_clip}; null turns clipping off")
        self.max_steps, self.epochs = max_steps, epochs
        self.micro_batch_size, self.accumulate = micro_batch_size, accumulate
        self.precision, self.zero_stage = precision, resolve_stage(zero_stage, deepspeed)
        self.deepspeed, self.gradient_clip, self.max_skipped_steps = deepspeed, gradient_clip, max_skipped_steps
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
        """Train: ``setup``, ``run`` and ``close``.

        Args:
            task: model and loss.
            data: batches.
            optimizer: from parameter groups to an optimizer, such as ``functools.partial(torch.optim.AdamW, lr=1e-3)``.
            schedule: of the learning rate; None keeps it constant.
            callbacks: by name, under which checkpoints hold their state.
            output_dir: the run's folder.
            seed: of the data order and of random numbers in training.
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
        """Train what ``setup`` has prepared, to the last step or until a callback or a signal ends the run."""
        with stop_on_signals(self._on_signal):
            try:
                self.call("on_fit_start")
                self.started = True
                stopping = self.agree_on_stopping()
                while self.step < self.plan.max_steps and not stopping:
                    self.call("on_step_start")
                    self.train_step(next(self.windows))
                    self.step += 1
                    self.call("on_step_end")  # validation runs here
                    if self.step % self.log_every == 0 or self.step == self.plan.max_steps:
                        self.call("on_log", self.flush_metrics())  # reduced over ranks, once
                    stopping = self.agree_on_stopping()
                    self.call("on_save")  # everything above is final
                if not self.interrupted:
                    self.save_model(self.output_dir)
                self.call("on_fit_end")
                self.finished = True
            except BaseException as error:
                self.call("on_exception", error)
                raise

    def train_step(self, window: list[Batch]) -> None:
        """Take one optimizer step on this rank's prepared micro-batches. A window without targets on any rank changes nothing.

        Raises:
            FloatingPointError: a loss is NaN or infinite, or the gradients of ``max_skipped_steps`` steps in a row are.
        """
        counts = self.count_targets(window)
        self.learning_rate = set_learning_rate(
            self.engine.parameter_groups, self.schedule.factor(self.step, self.plan.max_steps)
        )
        if not any(counts.values()):
            return
        for index, batch in enumerate(window):
            sums = self.task.all_losses(self.engine, self.to_device(batch))  # of losses, and of logged metrics
            loss = self.task.total(sums, counts)
            # DeepSpeed averages gradients over ranks; the counts are already those of all ranks.
            self.engine.backward(loss * self.plan.world_size)
            self.accumulator.add_micro_batch(self.step, index, loss, sums)
        taken = self.engine.step()
        self.task.after_step()
        self.accumulator.add_counts(counts)
        self.tokens += self.task.tokens(counts)
        if taken:
            self.skipped.add_taken()
        else:
            self.check_finite()
            self.skipped.add_skipped(self.step + 1, self.engine.lowers_loss_scale())

    def count_targets(self, window: list[Batch]) -> dict[str, float]:
        """Number of targets of each loss term over micro-batches and ranks. Collective."""
        totals: dict[str, int] = {}
        for batch in window:
            for name, count in self.task.all_counts(batch).items():
                totals[name] = totals.get(name, 0) + int(count)
        return self.reduce_sums(totals)

    def _on_signal(self) -> None:
        self.signalled = True
        if process_group.is_main():
            print("\nstopping after this step and saving; interrupt again to stop at once", file=sys.stderr, flush=True)

    def agree_on_stopping(self) -> bool:
        """Whether any rank is to stop: callbacks and signals reach the ranks at different times. Collective."""
        flags = self.reduce_sums({"stop": self.should_stop or self.signalled, "interrupt": self.signalled})
        self.should_stop, self.interrupted = flags["stop"] > 0, flags["interrupt"] > 0
        return self.should_stop

    def validate(self) -> dict[str, float]:
        """Compute the task's metrics over all validation samples, and call ``on_validation_end``. Collective."""
        from bumblebee.training.loader import validation_batches
        from bumblebee.training.validation import validation_sums

        self.engine.eval()
        batches = validation_batches(self.data, self.micro_batch_size, process_group.rank(), self.plan.world_size)
        sums = validation_sums(self.task, self.engine, map(self.to_device, batches))
        self.engine.train()
        metrics = self.task.validation_metrics(self.reduce_sums(sums))
        self.schedule.observe(metrics)
        self.call("on_validation_end", metrics)
        return metrics

    def report_evaluation(self, metrics: dict[str, float]) -> None:
        """Log the metrics of an evaluation on tasks, and call ``on_evaluation_end``.

        Args:
            metrics: named ``eval/<task>`` or ``eval/<task>/<metric>``; the same on every rank.
        """
        for name, value in metrics.items():
            self.log(name, value)
        self.call("on_evaluation_end", metrics)

    def report_samples(self, samples: Sequence[SampledText]) -> None:
        """Call ``on_samples`` with texts that the model has written."""
        self.call("on_samples", samples)

    # -- metrics -------------------------------------------------------------------------------------------------------

    def log(self, name: str, value: float) -> None:
        """Add a metric to the next line. Rank 0's value is logged."""
        self.extra_metrics[name] = value

    def flush_metrics(self) -> dict[str, float]:
        """Return the metrics since the last line: each of the task's sums over its count, over ranks and steps."""
        self.check_finite()
        terms = self.accumulator.averages(self.reduce_sums(self.accumulator.sums), self.task.units)
        metrics: dict[str, float] = {"step": self.step, "epoch": round(self.plan.epoch(self.step), 6)}
        if terms:
            # Of the task's own terms; the model's auxiliary losses are logged separately.
            metrics["loss"] = sum(weight * terms[name] for name, weight in self.task.weights.items() if name in terms)
            metrics.update((name, value) for name, value in terms.items() if name != "loss" and not name.startswith("_"))
            metrics.update(self.task.derived_metrics(terms))
            metrics.update(grad_norm=self.engine.gradient_norm(), **self.engine.loss_scale())
            if self.skipped.total or self.precision == "fp16":
                metrics["skipped_steps"] = self.skipped.total
        metrics.update(lr=self.learning_rate, tokens=self.tokens, **self.task.metrics(), **self.extra_metrics)
        self.accumulator.clear()
        self.extra_metrics = {}
        return metrics

    def check_finite(self) -> None:
        """Raise if a weight, or a loss since the last check, is NaN or infinite. Collective.

        Runs before metrics are logged and before anything is saved. Synchronizes with the GPU once.

        Raises:
            FloatingPointError: on the rank with that loss or weight, naming the step and the samples of the micro-batch, or
                the parameter.
            OtherRankFailed: on the other ranks.
        """
        from bumblebee.training.non_finite import find_non_finite

        error = find_non_finite(self, self.accumulator.pop_losses())
        process_group.raise_on_all_ranks(error, "another rank had a loss or a weight that is not finite")

    # -- set-up and checkpoints ----------------------------------------------------------------------------------------

    def building(self) -> AbstractContextManager[None]:
        """A context in which to build the model: at stage 3, no rank then holds the whole model."""
        from bumblebee.training import setup

        return setup.building(self)

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
        """Prepare everything that ``run`` needs; see ``fit`` for the arguments. The folder is changed last.

        Raises:
            ValueError: data, folder or options that cannot be used; nothing has been written then.
        """
        from bumblebee.training.setup import set_up

        try:
            set_up(self, task, data, optimizer, schedule, callbacks, output_dir, seed, overwrite)
        except BaseException:
            self._unlock_folder()
            raise

    def save_checkpoint(self, last: bool = False, model: bool = True) -> Path:
        """Write ``output_dir/checkpoint-<step>``: a model folder with the training state. Complete or absent. Collective.

        Args:
            last: the run ends here, so that the checkpoint is kept outside of the rotation.
            model: write the weights as a model folder too. Without it nothing is gathered, and ``bumblebee consolidate`` makes
                the model folder from the training state.

        Raises:
            OSError: it could not be written; nothing of it is left, and earlier checkpoints are unchanged.
            FloatingPointError: a weight, or a loss since the last check, is NaN or infinite.
        """
        from bumblebee.training.checkpointing import write_checkpoint

        self.check_finite()
        path = self.output_dir / f"checkpoint-{self.step}"
        write_checkpoint(self, path, last, model)
        self.call("on_checkpoint_saved", path)
        return path

    def save_model(self, folder: Path) -> None:
        """Write the model folder: weights in the training precision, config, tokenizer. Collective.

        Raises:
            FloatingPointError: a weight, or a loss since the last check, is NaN or infinite.
        """
        from bumblebee.training.checkpointing import write_model

        self.check_finite()
        write_model(self, folder)

    def close(self) -> None:
        """Release DeepSpeed's memory, the output folder and the process group. Call it however the run ended.

        On several GPUs an exception that ended the run ends the process too, see ``process_group.exit_after_failure``.
        """
        self._unlock_folder()
        finished: bool = self.__dict__.get("finished", False)
        if not finished and (error := sys.exc_info()[1]):
            process_group.exit_after_failure(error)
        for frozen in self.__dict__.pop("frozen_engines", []):
            frozen.close()
        if engine := self.__dict__.pop("engine", None):
            engine.close()
        process_group.stop(orderly=finished)

    def _unlock_folder(self) -> None:
        if lock := self.__dict__.pop("lock", None):
            lock.release()

    def call(self, hook: str, *args: object) -> None:
        """Call a hook of every callback."""
        for callback in self.callbacks.values():
            getattr(callback, hook)(self, *args)
