"""Recipes: the groups of options that describe a training run, and the objects that are built from them.

    parser = recipe_parser()
    run = build(parser.parse_string(text))            # a Run: task, data, optimizer, schedule, trainer, callbacks
    run.trainer.setup(run.task, run.data, ...)

``bumblebee.cli`` adds ``--config`` and each command's own options to the same groups. The resolved recipe (``dump``) describes
the same run by itself; a run saves it as ``output_dir/recipe.yaml``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from jsonargparse import ArgumentParser, Namespace

from bumblebee.callback import Callback
from bumblebee.datamodule import DataModule
from bumblebee.optim import Optimizer, Schedule
from bumblebee.tasks.task import Task
from bumblebee.trainer import Trainer

GROUPS = ("seed", "output_dir", "task", "data", "optimizer", "schedule", "trainer", "callbacks")
OptimizerFactory = Callable[[Iterable], Optimizer]  # from parameter groups to an optimizer


@dataclass
class Run:
    """The objects that a recipe describes.

    Args:
        task: the model and its loss.
        data: provides the training batches.
        optimizer: from parameter groups to an optimizer.
        schedule: learning rate schedule; None keeps the learning rate constant.
        trainer: the loop and its options.
        callbacks: by name; None is a callback that a later recipe has removed.
        output_dir: the run's folder.
        seed: of the weights, the order of the data and random numbers in training.
    """

    task: Task
    data: DataModule
    optimizer: OptimizerFactory
    schedule: Schedule | None
    trainer: Trainer
    callbacks: dict[str, Callback | None]
    output_dir: str
    seed: int


def add_recipe_arguments(parser: ArgumentParser) -> None:
    """Add the groups of a recipe to a parser."""
    parser.add_argument("--seed", type=int, default=42, help="seed of weights, data order and random numbers in training")
    parser.add_argument("--output_dir", type=str, default="runs/fit", help="the run's folder")
    parser.add_subclass_arguments(Task, "task", required=True, help="model and loss")
    parser.add_subclass_arguments(DataModule, "data", required=True, help="provides the training batches")
    parser.add_argument("--optimizer", type=OptimizerFactory, required=True, help="an optimizer class and its options")
    parser.add_argument("--schedule", type=Schedule | None, default=None, help="learning rate schedule; null: constant")
    parser.add_class_arguments(Trainer, "trainer")
    callbacks_help = "callbacks by name; null removes the one of an earlier recipe"
    parser.add_argument("--callbacks", type=dict[str, Callback | None], default={}, help=callbacks_help)


def recipe_parser() -> ArgumentParser:
    """Return a parser of the groups alone, which raises ``jsonargparse.ArgumentError`` for an invalid recipe."""
    parser = ArgumentParser(exit_on_error=False)
    add_recipe_arguments(parser)
    return parser


def dump(config: Namespace) -> str:
    """Return the resolved recipe as YAML, null values included and a command's other options left out."""
    return recipe_parser().dump(Namespace({name: config[name] for name in GROUPS}), skip_unset=False)


def build(config: Namespace, model_context: Callable[[], AbstractContextManager[object]] | None = None) -> Run:
    """Instantiate the classes of a parsed recipe, the model with the recipe's seed.

    Args:
        config: the parsed recipe.
        model_context: returns the context in which the task and its model are built; by default the trainer's own, which
            partitions the model at ZeRO stage 3.

    Raises:
        ValueError: options that a constructor refuses.
    """
    import torch

    parser = recipe_parser()
    trainer: Trainer = parser.instantiate(Namespace(trainer=config.trainer)).trainer
    torch.manual_seed(config.seed)
    with (model_context or trainer.building)():
        task: Task = parser.instantiate(Namespace(task=config.task)).task
    parts = parser.instantiate(Namespace({name: config[name] for name in ("data", "optimizer", "schedule", "callbacks")}))
    return Run(task, parts.data, parts.optimizer, parts.schedule, trainer, parts.callbacks, config.output_dir, config.seed)


def build_data(config: Namespace) -> DataModule:
    """Instantiate only the DataModule of a parsed recipe."""
    data: DataModule = recipe_parser().instantiate(Namespace(data=config.data)).data
    return data
