"""``bumblebee sweep``: search the options of a recipe for the best value of a metric."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from bumblebee.cli.errors.reporting import fail, run_errors
from bumblebee.cli.parser import Parser
from bumblebee.cli.recipe_options import recipe_command_parser
from bumblebee.recipe import dump
from bumblebee.sweep.errors import SweepError
from bumblebee.sweep.ladder.rungs import Ladder, resolve
from bumblebee.sweep.parameter import OPTIONS, Value
from bumblebee.sweep.recipe import SweepRecipe, class_paths
from bumblebee.sweep.sweep_file import SweepFile
from bumblebee.sweep.sweep_options import SweepOptions
from bumblebee.utils.formatting import format_metric, plural, short
from bumblebee.utils.text_files import write_text

if TYPE_CHECKING:
    from bumblebee.sweep.ladder.ladder_report import LadderReport

_NEEDED = ("optuna", "scipy")


def parser() -> Parser:
    """Return the options of the command."""
    options = recipe_command_parser("sweep")
    options.add_class_arguments(SweepOptions, None)
    return options


def run(words: Sequence[str]) -> None:
    """Execute the command. The exit code is 1 if no trial has completed, 130 if the sweep was interrupted."""
    options = parser()
    cfg = options.parse(words)
    choices = SweepOptions(**{name: cfg[name] for name in SweepOptions.__dataclass_fields__})
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        fail(f"sweeps need {' and '.join(missing)}: pip install 'bumblebee[sweep]'")
    if choices.wandb is not None and find_spec("wandb") is None:
        fail("--wandb needs the wandb package: pip install wandb")
    try:
        with run_errors():
            file, recipe = SweepFile.read(choices.sweep), SweepRecipe(dump(cfg), choices.wandb)
            check_metric(file, recipe)
            ladder = None
            if file.ladder:
                file, ladder = resolve(file, file.ladder, lambda options: measure(file, recipe, options, choices))
            check_parameters(file, recipe)
            _run(file, recipe, choices, ladder)
    except SweepError as error:
        fail(str(error))


def _run(file: SweepFile, recipe: SweepRecipe, choices: SweepOptions, ladder: Ladder | None) -> None:
    from bumblebee.sweep.sweep import Sweep

    sweep = Sweep(file, recipe, choices, ladder)
    outcome = sweep.run()
    best = sweep.best()
    trials = sweep.study.trials()
    left = sum(trial.state == "running" for trial in trials)
    ended = plural(len(trials) - left, "trial")
    if outcome != "finished":
        print(f"stopped after {ended}{' (--timeout)' if outcome == 'timeout' else ''}: continue with --resume")
    elif left:
        print(f"{plural(left, 'trial')} did not end: --resume finishes what was cut off")
    if sweep.ladder_report:
        _print_law(file, sweep.ladder_report)
    elif best is not None and best.metric is not None:
        result = f"{file.metric} {format_metric(file.metric, best.metric)}"
        print(f"best of {ended}: {best.name} with {result}; {sweep.folder / 'best.yaml'}")
    print(f"results: {sweep.folder}")
    if outcome == "interrupted":
        raise SystemExit(130)
    if best is None and outcome == "finished":
        print(f"bumblebee: no trial has completed: see message in {sweep.folder / 'trials.md'}")
        raise SystemExit(1)


def _print_law(file: SweepFile, report: LadderReport) -> None:
    written = report.write()
    if written is None:
        print(f"no law: it needs more than {plural(len(report.runs), 'trained size')}")
        return
    law, predictions = written
    print(f"{file.metric} = {law.formula()}")
    for each in predictions:
        size = f"{short(each.rung.parameters)} parameters, {short(each.rung.tokens)} tokens"
        print(f"predicted for {size}: {each.loss:.4f} ({each.low:.4f} to {each.high:.4f}, two standard errors)")


def measure(file: SweepFile, recipe: SweepRecipe, options: Mapping[str, Value], choices: SweepOptions) -> tuple[float, float]:
    """Number of parameters in matrix products, and of tokens per step, of the recipe with some options.

    Raises:
        SweepError: the options cannot be used.
    """
    from contextlib import nullcontext

    from bumblebee.hardware.flops import weight_flops_per_token
    from bumblebee.models.load_context import shapes_only
    from bumblebee.recipe import build

    with TemporaryDirectory() as folder:
        base = Path(folder, "base.yaml")
        write_text(base, recipe.text)
        words = recipe.words(base, {OPTIONS: dict(options)})
        if problem := _parse_error(words):
            raise SweepError(f"{file.at('ladder.sizes')}: {problem.replace(f'{base}:', 'the recipe, line ')}")
        cfg = recipe_command_parser("fit").parse(words)
    length = cfg.data.get("init_args", {}).get("max_length")
    if not length:
        raise SweepError(f"{file.at('ladder')}: the recipe's data has no max_length, from which tokens per step are computed")
    with shapes_only():
        model = build(cfg, nullcontext).task.model
    group = choices.devices[0] if choices.devices else 1
    ranks = len(group) if isinstance(group, list) else 1
    return weight_flops_per_token(model) / 6, length * cfg.trainer.micro_batch_size * cfg.trainer.accumulate * ranks


def check_metric(file: SweepFile, recipe: SweepRecipe) -> None:
    """Refuse a metric of validations that the recipe does not make.

    Raises:
        SweepError: there is no callback that validates.
    """
    from bumblebee.cli.signatures import locate_callable

    validates = any(getattr(locate_callable(path), "validates", False) for path in class_paths(recipe))
    if file.metric.startswith("validation_") and not validates:
        raise SweepError(
            f"{file.at('metric.name')}: {file.metric} needs validations: add --callbacks.validation callbacks.Validation"
        )


def check_parameters(file: SweepFile, recipe: SweepRecipe) -> None:
    """Parse the recipe with each value of a choice, and one of a range.

    Raises:
        SweepError: an option does not exist or does not accept a value.
    """
    with TemporaryDirectory() as folder:
        base = Path(folder, "base.yaml")
        write_text(base, recipe.text)
        firsts = {parameter.key: parameter.examples()[0] for parameter in file.parameters}
        are_fine = not _parse_error(recipe.words(base, firsts))
        values: dict[str, Value] = {}
        for parameter in file.parameters:  # an error of one that follows is not this one's
            for value in reversed(parameter.examples()[are_fine:]):
                problem = _parse_error(recipe.words(base, {**values, parameter.key: value}))
                if problem:
                    reason = problem.replace(f"{base}:", "the recipe, line ")
                    raise SweepError(f"{file.at(f'parameters.{parameter.key}')}: {reason}")
            values[parameter.key] = parameter.examples()[0]


def _parse_error(words: list[str]) -> str:
    """What ``fit`` would say about its options; "" if it accepts them."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            recipe_command_parser("fit").parse(words)
    except SystemExit:
        return printed.getvalue().strip().removeprefix("bumblebee: ")
    return ""
