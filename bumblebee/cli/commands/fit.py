"""``bumblebee fit``: train a model from a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bumblebee.cli.errors.value_errors import user_errors
from bumblebee.cli.parser import Parser
from bumblebee.cli.recipe_options import recipe_command_parser
from bumblebee.distributed import process_group
from bumblebee.recipe import build, dump
from bumblebee.utils.text_files import write_text


def parser() -> Parser:
    """Return the options of the command."""
    options = recipe_command_parser("fit")
    options.add_argument("--overwrite", type=bool, default=False, help="delete an earlier run in output_dir")
    return options


def run(words: Sequence[str]) -> None:
    """Execute the command."""
    options = parser()
    cfg = options.parse(words)
    overwrite = cfg.pop("overwrite")
    with user_errors(cfg, options.words):
        run = build(cfg)
    trainer = run.trainer
    try:
        with user_errors(cfg, options.words):
            trainer.setup(run.task, run.data, run.optimizer, run.schedule, run.callbacks, run.output_dir, run.seed, overwrite)
            if process_group.is_main():
                write_text(Path(run.output_dir, "recipe.yaml"), dump(cfg))
        with user_errors(cfg, options.words, until=lambda: trainer.started):
            trainer.run()
    finally:
        trainer.close()
