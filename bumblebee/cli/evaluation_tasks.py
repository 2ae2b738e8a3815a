"""``--tasks`` of ``bumblebee evaluate``: names of tasks, with a file each where they need one, and files of tasks.

    exact_match                   the questions of the recipe's data
    multiple_choice:FILE          a task with its file
    arc_easy                      a task, group or tag of lm-evaluation-harness (extra ``eval``)
    tasks.yaml                    tasks: {NAME: {class_path: bumblebee.evaluation.tasks.Generation, init_args: {...}}, ...}

Several are written one after another or separated by commas.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from bumblebee.cli.config_files import problem_of_file
from bumblebee.cli.errors.parse_errors import explain
from bumblebee.cli.errors.reporting import fail
from bumblebee.utils.formatting import hint

if TYPE_CHECKING:
    from bumblebee.datamodule import DataModule
    from bumblebee.evaluation.tasks.task import EvaluationTask

CLASSES = {
    "perplexity": "Perplexity",
    "multiple_choice": "MultipleChoice",
    "generation": "Generation",
    "preference_accuracy": "PreferenceAccuracy",
    "exact_match": "ExactMatch",
}
_OF_DATA = ("perplexity", "preference_accuracy", "exact_match")  # a file is a DataModule's; without one it is the recipe's


class NamedTask:
    """A task of the command line.

    Args:
        name: unique in the evaluation.
        task: the task.
        description: what makes it again, for results.json.
    """

    def __init__(self, name: str, task: EvaluationTask, description: object) -> None:
        self.name, self.task, self.description = name, task, description


def resolve_tasks(words: Sequence[str], model: str, max_length: int, include_path: str | None = None) -> list[NamedTask]:
    """Make the tasks of ``--tasks``.

    Args:
        words: the values of the option.
        model: folder whose tokenizer the tasks' data use.
        max_length: tokens in a window or row of the tasks' files.
        include_path: folder of further tasks of lm-evaluation-harness.

    Raises:
        ValueError: a file cannot be used, or a task of lm-evaluation-harness is unknown.
    """
    tasks: list[NamedTask] = []
    for word in filter(None, ",".join(words).split(",")):
        added = _of_yaml(word, model) if word.endswith((".yaml", ".yml")) else [_short(word, model, max_length, include_path)]
        for task in added:
            if any(task.name == other.name for other in tasks):
                fail(f"--tasks: two tasks are named {task.name!r}; name them apart in a YAML file of tasks")
            tasks.append(task)
    if not tasks:
        fail("--tasks: expected a value")
    return tasks


def _short(word: str, model: str, max_length: int, include_path: str | None) -> NamedTask:
    """A task as NAME or NAME:FILE."""
    import bumblebee.evaluation.tasks as tasks

    kind, colon, file = word.partition(":")
    if kind not in CLASSES and not colon and not difflib.get_close_matches(kind, CLASSES, cutoff=0.8):
        return _of_harness(kind, include_path)
    if kind not in CLASSES:
        fail(f"--tasks: unknown task {kind!r}{hint(kind, CLASSES)}; tasks: {', '.join(CLASSES)}, or a YAML file of tasks")
    make: type[EvaluationTask] = getattr(tasks, CLASSES[kind])
    name = f"{kind}:{Path(file).stem}" if colon else kind
    if kind not in _OF_DATA:
        if not file:
            fail(f"--tasks: {kind} needs a file: write {kind}:FILE")
        return NamedTask(name, make(file), {"class_path": _path(kind), "init_args": {"file": file}})  # type: ignore[call-arg]
    if not file:
        return NamedTask(name, make(), {"class_path": _path(kind), "data": "recipe"})
    data, options = data_of_file(file, model, max_length)
    return NamedTask(name, make(data), {"class_path": _path(kind), "init_args": {"data": options}})  # type: ignore[call-arg]


def _of_harness(name: str, include_path: str | None) -> NamedTask:
    """A task of lm-evaluation-harness. Its index takes seconds: a slip in one of our own names is reported without it.

    Raises:
        ValueError: the package is missing, or the task is unknown.
    """
    from bumblebee.evaluation.harness import HarnessTask

    arguments: dict[str, object] = {"name": name, "include_path": include_path}
    return NamedTask(
        name,
        HarnessTask(name, include_path),
        {"class_path": "bumblebee.evaluation.harness.HarnessTask", "init_args": arguments},
    )


def _path(kind: str) -> str:
    return f"bumblebee.evaluation.tasks.{CLASSES[kind]}"


def data_of_file(file: str, model: str, max_length: int) -> tuple[DataModule, dict[str, object]]:
    """A DataModule of a file, by the keys of its first record: texts, conversations or preference pairs.

    Raises:
        ValueError: there is no such file, or nothing in it.
    """
    from datamodules.preference import Preferences
    from datamodules.pretrain import Pretrain
    from datamodules.record_files import expand, read
    from datamodules.sft import SFT

    [path, *_] = expand(file)
    record = next(iter(read(path)), None)
    if record is None:
        raise ValueError(f"{path}: the file has no records")
    made: type[DataModule] = Preferences if "chosen" in record.value else Pretrain if "text" in record.value else SFT
    options: dict[str, object] = {"files": file, "tokenizer": model, "max_length": max_length}
    return made(**options), {"class_path": f"datamodules.{made.__name__}", "init_args": options}


def _of_yaml(file: str, model: str) -> list[NamedTask]:
    """The tasks of a YAML file, whose data read the model's tokenizer.

    An error of a value names its file and line.
    """
    from bumblebee.evaluation.tasks import EvaluationTask

    if problem := problem_of_file(file):
        fail(problem.replace("--config", "--tasks"))
    content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    if not isinstance(content.get("tasks"), dict) or len(content) != 1:
        fail(f"{file}: expected one key, 'tasks:', with the tasks by name below it")
    for options in content["tasks"].values():
        data = (options.get("init_args") or {}).get("data") if isinstance(options, dict) else None
        if isinstance(data, dict):  # the model's tokenizer is the one that its probabilities are of
            data.setdefault("init_args", {})["tokenizer"] = model
    parser = ArgumentParser(exit_on_error=False)
    for name in content["tasks"]:
        if not re.fullmatch(r"[A-Za-z_][\w-]*", str(name)):
            fail(f"{file}: the name of a task consists of letters, digits, _ and -, got {name!r}")
        parser.add_argument(f"--tasks.{name}", type=EvaluationTask, required=True)
    try:
        config = parser.parse_object(content)
        made: Mapping[str, EvaluationTask] = parser.instantiate(config).tasks.as_dict()
    except ArgumentError as error:
        fail(explain(str(error), ["--config", file]))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return [NamedTask(name, task, _plain(config.tasks[name])) for name, task in made.items()]


def _plain(value: object) -> object:
    return value.as_dict() if isinstance(value, Namespace) else value
