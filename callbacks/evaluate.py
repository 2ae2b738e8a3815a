"""Evaluate: evaluation tasks on the model in training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bumblebee.callback import Callback
from bumblebee.training.metrics.jsonl_log import truncate_after
from bumblebee.utils.formatting import number
from bumblebee.utils.text_files import append_text

if TYPE_CHECKING:
    from bumblebee.evaluation.context import EvaluationContext, Split
    from bumblebee.evaluation.statistics import Estimate
    from bumblebee.evaluation.tasks.task import EvaluationTask, SampleResult
    from bumblebee.trainer import Trainer

FILE = "evaluation.jsonl"


class Evaluate(Callback):
    """Evaluates the model on tasks every few steps. The ranks share out the samples.

    The main metric of a task is logged as ``eval/<task>``, each of its metrics as ``eval/<task>/<metric>``; Checkpoint and
    EarlyStopping can follow them by these names. evaluation.jsonl has the standard errors. At ZeRO stage 3 every device holds
    the whole model during an evaluation.

    Args:
        tasks: by name, such as bumblebee.evaluation.tasks.MultipleChoice.
        every: optimizer steps between two evaluations.
        at_end: also evaluate after the last step.
        limit: maximum number of samples of each task; null for all.
        fewshot: solved examples before each question.
        chat: ask questions through the chat template.

    Raises:
        ValueError: there are no tasks, a name is not usable, or a number is out of range.
    """

    def __init__(
        self,
        tasks: dict[str, EvaluationTask],
        every: int = 500,
        at_end: bool = True,
        limit: int | None = None,
        fewshot: int = 0,
        chat: bool = False,
    ) -> None:
        if not tasks:
            raise ValueError("tasks must not be empty")
        if named := [name for name in tasks if "/" in name]:
            raise ValueError(f"tasks: the name {named[0]!r} contains a slash, which separates a task from its metric")
        for option, value, least in (("every", every, 1), ("limit", limit, 1), ("fewshot", fewshot, 0)):
            if value is not None and value < least:
                raise ValueError(f"{option} must be at least {least}, got {value}")
        self.tasks, self.every, self.at_end = tasks, every, at_end
        self.limit, self.fewshot, self.chat = limit, fewshot, chat
        self.evaluations = tuple(f"eval/{name}" for name in tasks)
        self._items: dict[str, Sequence[object]] = {}

    def summary(self) -> dict[str, object]:
        """Tasks, and when they run."""
        return {"tasks": ", ".join(self.tasks), "every": self.every}

    def check(self, trainer: Trainer) -> None:
        """Read what is to be evaluated.

        Raises:
            ValueError: the model is a reward model, the data has no tokenizer, or a task's file or data cannot be used.
        """
        from bumblebee.evaluation.evaluation import items_of

        if getattr(getattr(trainer.task.model, "config", None), "score_head", False):
            raise ValueError("callbacks: Evaluate needs a model that predicts tokens, not a reward model: remove the callback")
        if trainer.data.tokenizer is None:
            raise ValueError("callbacks: Evaluate needs a tokenizer: set data.tokenizer, or remove the callback")
        training = trainer.task.model.training
        context = self._context(trainer)
        trainer.task.model.train(training)
        for name, task in self.tasks.items():
            try:
                self._items[name] = items_of(task, context, self.limit)
            except ValueError as error:
                raise ValueError(f"callbacks: Evaluate: {name}: {error}") from error

    def on_fit_start(self, trainer: Trainer) -> None:
        """Drop evaluations after the step that the run resumes from."""
        if trainer.is_main:
            truncate_after(trainer.output_dir / FILE, trainer.step)

    def on_step_end(self, trainer: Trainer) -> None:
        """Evaluate if due."""
        if trainer.step % self.every == 0 or (self.at_end and trainer.step == trainer.plan.max_steps):
            self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        """Run all tasks on this rank's share of their samples, and report the metrics of all. Collective."""
        from bumblebee.distributed import process_group

        shares: dict[str, list[tuple[int, SampleResult]]] = {}
        error: Exception | None = None
        with trainer.engine.whole_model():
            context = self._context(trainer)
            try:
                shares = {name: self._share(name, context) for name in self.tasks}
            except (ValueError, FloatingPointError) as failure:
                error = failure
        trainer.engine.train()
        process_group.raise_on_all_ranks(error, "an evaluation task failed on another rank")
        metrics: dict[str, float] = {}
        for name, task in self.tasks.items():
            samples = dict(process_group.all_gather_items(shares[name]))
            estimates = task.metrics([samples[index] for index in range(len(samples))])
            metrics[f"eval/{name}"] = estimates[task.metric].value
            metrics |= {f"eval/{name}/{metric}": estimate.value for metric, estimate in estimates.items()}
            self._write(trainer, name, len(samples), task.metric, estimates)
        trainer.report_evaluation(metrics)

    def _share(self, name: str, context: EvaluationContext) -> list[tuple[int, SampleResult]]:
        """The results of this rank's samples, with their numbers."""
        from bumblebee.distributed import process_group

        numbers = range(process_group.rank(), len(self._items[name]), process_group.world_size())
        items = [self._items[name][index] for index in numbers]
        results = self.tasks[name].results(context, items, lambda count: None) if items else []
        return list(zip(numbers, results, strict=True))

    def _context(self, trainer: Trainer) -> EvaluationContext:
        from bumblebee.evaluation.context import EvaluationContext
        from bumblebee.inference.generator import Generator

        assert trainer.data.tokenizer is not None
        generator = Generator(trainer.task.model, trainer.data.tokenizer, trainer.data.stop_ids)  # type: ignore[arg-type]
        split: Split = "validation"
        return EvaluationContext(generator, trainer.data, split, self.chat, self.fewshot)

    def _write(self, trainer: Trainer, name: str, count: int, main: str, estimates: dict[str, Estimate]) -> None:
        if not trainer.is_main:
            return
        metrics = {metric: {"value": each.value, "stderr": each.stderr} for metric, each in estimates.items()}
        line = {"step": trainer.step, "task": name, "samples": count, "metrics": metrics}
        append_text(trainer.output_dir / FILE, json.dumps(line) + "\n")
        value, error = estimates[main]
        deviation = "" if error is None else f" ± {number(error)}"
        trainer.print(f"evaluation at step {trainer.step:,}: {name}: {main} {number(value)}{deviation} ({count} samples)")
