"""Run tasks on a model: results as a table, as JSON with all that is needed to repeat them, and each sample as JSON Lines."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from time import monotonic

from bumblebee import __version__
from bumblebee.checkpoint.adapters.folder import adapter_chain
from bumblebee.checkpoint.digests import remembered_digest
from bumblebee.evaluation.context import EvaluationContext
from bumblebee.evaluation.statistics import Estimate
from bumblebee.evaluation.tasks.task import EvaluationTask, Progress, SampleResult
from bumblebee.utils.cache_dir import resolve_cache_dir
from bumblebee.utils.formatting import number
from bumblebee.utils.json_files import write_json
from bumblebee.utils.text_files import write_text

RESULTS = "results.json"
PACKAGES = ("torch", "tokenizers", "safetensors", "jinja2")  # their versions can change results
DIGESTED = (".safetensors", ".bin", ".json", ".jinja", ".txt")


@dataclass(frozen=True)
class TaskResult:
    """The results of a task.

    Args:
        name: of the task.
        metrics: by name.
        samples: of each item, in order.
        seconds: how long it took.
    """

    name: str
    metrics: Mapping[str, Estimate]
    samples: Sequence[SampleResult]
    seconds: float


def items_of(task: EvaluationTask, context: EvaluationContext, limit: int | None) -> Sequence[object]:
    """The first ``limit`` items of a task.

    Raises:
        ValueError: its data cannot be used, or has no items.
    """
    items: Sequence[object] = task.items(context)[:limit]
    if not items:
        raise ValueError("the task has nothing to evaluate")
    return items


def run_task(
    name: str, task: EvaluationTask, context: EvaluationContext, items: Sequence[object], progress: Progress
) -> TaskResult:
    """Evaluate items of a task in this process."""
    started = monotonic()
    samples = task.results(context, items, progress)
    return TaskResult(name, task.metrics(samples), samples, monotonic() - started)


def table(results: Iterable[TaskResult]) -> str:
    """A line for each metric: task, metric, value with its standard error, number of samples."""
    rows = [("task", "metric", "value", "stderr", "samples")]
    for result in results:
        for index, (metric, estimate) in enumerate(result.metrics.items()):
            error = "" if estimate.stderr is None else f"± {number(estimate.stderr)}"
            name = result.name if index == 0 else ""
            rows.append((name, metric, number(estimate.value), error, str(len(result.samples)) if index == 0 else ""))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:<{widths[3]}}  {row[4]:>{widths[4]}}"
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


class ResultsFolder:
    """Writes each task's results as soon as it is finished, so that an interrupted evaluation keeps what it has.

    Args:
        folder: results.json and samples/<task>.jsonl.
        about: what is needed to repeat the evaluation: ``describe``.
        tasks: the description of each task, by name.
    """

    def __init__(self, folder: Path, about: Mapping[str, object], tasks: Mapping[str, object]) -> None:
        self.folder, self.about, self.tasks = folder, about, tasks
        self._finished: dict[str, object] = {}
        (folder / "samples").mkdir(parents=True, exist_ok=True)

    def add(self, result: TaskResult) -> None:
        """Write the results of a task.

        Raises:
            OSError: they cannot be written.
        """
        file = self.folder / "samples" / f"{result.name.replace(':', '-').replace('/', '-')}.jsonl"
        lines = [{"index": index, **_fields(sample)} for index, sample in enumerate(result.samples)]
        write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        self._finished[result.name] = {
            "task": self.tasks[result.name],
            "samples": len(result.samples),
            "seconds": round(result.seconds, 3),
            "metrics": {name: {"value": each.value, "stderr": each.stderr} for name, each in result.metrics.items()},
            "file": str(file.relative_to(self.folder)),
        }
        write_json(self.folder / RESULTS, {**self.about, "tasks": self._finished})


def _fields(sample: SampleResult) -> dict[str, object]:
    fields = asdict(sample)
    details: dict[str, object] = fields.pop("details")
    scores: dict[str, float] = fields.pop("scores")
    return {**fields, "scores": scores, **details}


def describe(model: str, context: EvaluationContext, settings: Mapping[str, object]) -> dict[str, object]:
    """The model folder with the SHA-256 of its files, the settings, and the versions of everything that computes.

    Args:
        model: the folder; an adapter's base models are described with it.
        context: the evaluation.
        settings: the options of the command.
    """
    memory = resolve_cache_dir() / "digests"
    digests = {
        str(file): remembered_digest(file, memory)
        for folder in adapter_chain(model)
        for file in sorted(folder.iterdir())
        if file.suffix in DIGESTED and file.is_file() and file.name not in ("trainer_state.json", RESULTS)
    }
    generator = context.generator
    versions = {"bumblebee": __version__, "python": platform.python_version()}
    return {
        "model": model,
        "digests": digests,
        "device": str(generator.device),
        "dtype": str(generator.dtype).removeprefix("torch."),
        "settings": dict(settings),
        "versions": versions | {package: metadata.version(package) for package in PACKAGES},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """The commit of the checkout that this code runs from, with "-dirty" if it has changes; None outside of one."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
