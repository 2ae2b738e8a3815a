"""``bumblebee evaluate``: evaluate a model on tasks.

``--tasks`` names them (``bumblebee/cli/evaluation_tasks.py``). With ``--config RECIPE`` tasks can use its data; without
``--tasks`` they are then the questions of that data, answered exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace

from bumblebee.cli.config_files import option_values
from bumblebee.cli.errors.reporting import fail, run_errors
from bumblebee.cli.errors.value_errors import user_errors
from bumblebee.cli.parser import Parser, command_parser
from bumblebee.cli.recipe_options import recipe_command_parser, use_tokenizer_of

if TYPE_CHECKING:
    from bumblebee.cli.evaluation_tasks import NamedTask
    from bumblebee.evaluation.context import EvaluationContext
    from bumblebee.evaluation.evaluation import TaskResult
    from bumblebee.evaluation.tasks.task import SampleResult
    from bumblebee.inference.generator import Generator

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left]"
SHOWN = 10  # samples that are printed without --tasks
_SETTINGS = ("tasks", "include_path", "split", "limit", "fewshot", "chat", "max_length", "device_map", "quantize")


def parser() -> Parser:
    """Return the options of the command without a recipe."""
    options = command_parser("evaluate")
    config_help = "recipe whose data tasks can use; its other options may follow, as for fit"
    options.add_argument("--config", type=str | None, default=None, help=config_help)
    return _add_options(options)


def _add_options(options: Parser) -> Parser:
    options.add_argument("--model", type=str | None, default=None, help="model folder; null: the recipe's output_dir")
    tasks_help = "tasks, as NAME, NAME:FILE or a YAML file of tasks; null: exact_match on the recipe's data"
    options.add_argument("--tasks", type=list[str] | None, default=None, help=tasks_help)
    include_help = "folder of further tasks of lm-evaluation-harness (YAML), which precede its own"
    options.add_argument("--include_path", type=str | None, default=None, help=include_help)
    split_help = "samples of the recipe's data; null: train for exact_match without tasks, else validation"
    options.add_argument("--split", type=Literal["train", "validation"] | None, default=None, help=split_help)
    options.add_argument("--limit", type=int | None, default=None, help="maximum number of samples of each task; null: all")
    options.add_argument("--fewshot", type=int, default=0, help="solved examples before each question")
    options.add_argument("--chat", type=bool, default=False, help="ask questions through the tokenizer's chat template")
    length_help = "tokens in a window or row of tasks' files; null: the model's positions"
    options.add_argument("--max_length", type=int | None, default=None, help=length_help)
    options.add_argument("--output", type=str | None, default=None, help="folder of results.json and samples; null: print only")
    options.add_argument("--overwrite", type=bool, default=False, help="replace the results in the output folder")
    show_help = f"number of samples of each task to print; null: {SHOWN} without tasks, else 0"
    options.add_argument("--show", type=int | None, default=None, help=show_help)
    options.add_argument("--device", type=str | None, default=None, help="auto, cpu, cuda or cuda:N; null: as the recipe")
    options.add_argument("--dtype", type=str, default="auto", help="auto (as stored), float32, bfloat16 or float16")
    map_help = "auto: spread the layers of a model over all GPUs if it does not fit on one; null: use one device"
    options.add_argument("--device_map", type=Literal["auto"] | None, default=None, help=map_help)
    quantize_help = "int8 or int4 weights, quantized while loading; null keeps them as stored"
    options.add_argument("--quantize", type=Literal["int8", "int4"] | None, default=None, help=quantize_help)
    options.add_argument("--trust_remote_code", type=bool, default=False, help="run code that the model folder names or holds")
    return options


def run(words: Sequence[str]) -> None:
    """Execute the command."""
    has_recipe = any(option == "--config" for option, _ in option_values(words))
    options = _add_options(recipe_command_parser("evaluate")) if has_recipe else parser()
    cfg = options.parse(words)
    folder = cfg.model or (cfg.output_dir if has_recipe else None)
    if folder is None:
        fail("missing required option 'model': name a model folder, or a recipe with --config")
    if cfg.tasks is None and not has_recipe:
        fail("missing required option 'tasks': name tasks, or a recipe with --config")
    with user_errors(cfg, options.words):
        from bumblebee.evaluation.evaluation import ResultsFolder, describe, items_of

        check_options(cfg)
        context = _context(cfg, folder, has_recipe)
        positions = context.generator.model.config.max_position_embeddings
        tasks = _tasks(cfg, folder, cfg.max_length or positions)
        items = [items_of(each.task, context, cfg.limit) for each in tasks]  # all files, before anything is computed
        output = None
        if cfg.output is not None:
            about = describe(folder, context, {name: cfg[name] for name in _SETTINGS})
            output = ResultsFolder(Path(cfg.output), about, {each.name: each.description for each in tasks})
    results = []
    with user_errors(cfg, options.words), run_errors():
        for task, task_items in zip(tasks, items, strict=True):
            results.append(_run(task, context, task_items))
            if output is not None:
                output.add(results[-1])
    _print(results, SHOWN if cfg.tasks is None and cfg.show is None else cfg.show or 0)
    if cfg.output is not None:
        print(f"\nresults: {cfg.output}/results.json, {cfg.output}/samples")


def check_options(cfg: Namespace) -> None:
    """Check numbers, and that no results are lost.

    Raises:
        ValueError: a number is out of range, or the output folder has results and ``overwrite`` is not set.
    """
    for name, least in (("limit", 1), ("max_length", 1), ("fewshot", 0), ("show", 0)):
        if cfg[name] is not None and cfg[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {cfg[name]}")
    if cfg.output is not None and (Path(cfg.output) / "results.json").exists() and not cfg.overwrite:
        raise ValueError(f"output: {cfg.output} already has results: add --overwrite to replace them")


def _context(cfg: Namespace, folder: str, has_recipe: bool) -> EvaluationContext:
    """The model with the recipe's data, if there is a recipe."""
    from bumblebee.evaluation.context import EvaluationContext, Split
    from bumblebee.inference.generator import Generator
    from bumblebee.recipe import build_data

    data = None
    if has_recipe:
        use_tokenizer_of(cfg, folder)
        data = build_data(cfg)
        if cfg.tasks is None and not data.has_prompts:
            raise ValueError(
                f"data: {type(data).__name__} has no questions to evaluate: name --tasks, such as perplexity, or a recipe with"
                " datamodules.SFT"
            )
        data.setup(cfg.seed)
    device = cfg.device or (cfg.trainer.device if has_recipe else "auto")
    generator: Generator = Generator.from_pretrained(
        folder, device, cfg.dtype, cfg.device_map, cfg.trust_remote_code, cfg.quantize
    )
    split: Split = cfg.split or ("train" if cfg.tasks is None else "validation")
    return EvaluationContext(generator, data, split, cfg.chat, cfg.fewshot)


def _tasks(cfg: Namespace, folder: str, max_length: int) -> list[NamedTask]:
    from bumblebee.cli.evaluation_tasks import resolve_tasks

    return resolve_tasks(["exact_match"] if cfg.tasks is None else cfg.tasks, folder, max_length, cfg.include_path)


def _run(task: NamedTask, context: EvaluationContext, items: Sequence[object]) -> TaskResult:
    from tqdm import tqdm

    from bumblebee.evaluation.evaluation import run_task

    with tqdm(total=len(items), desc=task.name, bar_format=BAR, disable=None, leave=False) as bar:
        return run_task(task.name, task.task, context, items, bar.update)


def _print(results: Sequence[TaskResult], show: int) -> None:
    """Print some samples of each task, evenly spread, the table, and the share of exact matches as a count."""
    from bumblebee.evaluation.evaluation import table

    for result in results:
        for sample in result.samples[:: max(1, len(result.samples) // max(show, 1))][:show]:
            _print_sample(sample)
    print(table(results))
    for result in results:
        scores = [sample.scores["exact_match"] for sample in result.samples if "exact_match" in sample.scores]
        if count := len(scores):
            matches = sum(score == 1 for score in scores)
            print(f"exact match: {matches} of {count} ({matches / count:.1%})")


def _print_sample(sample: SampleResult) -> None:
    turn = sample.details.get("turn", 1)
    is_right = sample.expected is None or sample.answer.strip() == str(sample.expected).strip()
    expected = "" if is_right else f"\n   (expected: {sample.expected})"
    number = f"(turn {turn}) " if turn != 1 else ""
    print(f"{number}{sample.prompt.strip()}\n-> {sample.answer.strip()}{expected}\n")
