"""``bumblebee preview``: show what a recipe would do: samples, counts, steps, parameters, memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from bumblebee.cli.errors.value_errors import user_errors
from bumblebee.cli.parser import Parser
from bumblebee.cli.recipe_options import recipe_command_parser
from bumblebee.distributed import process_group


def parser() -> Parser:
    """Return the options of the command."""
    options = recipe_command_parser("preview")
    options.add_argument("--samples", type=NonNegativeInt, default=3, help="number of training samples to show")
    options.add_argument("--ranks", type=PositiveInt | None, default=None, help="world size; null: that of the launcher")
    options.add_argument("--overwrite", type=bool, default=False, help="as for fit; preview deletes nothing")
    options.add_argument("--gpu", type=bool, default=False, help="estimate GPU memory, even on a machine without a GPU")
    measure_help = "run a few training steps: auto only if that is quick"
    options.add_argument("--measure", type=Literal["auto", "always", "never"], default="auto", help=measure_help)
    return options


def run(words: Sequence[str]) -> None:
    """Execute the command."""
    options = parser()
    cfg = options.parse(words)
    samples = cfg.pop("samples")
    choices = {name: cfg.pop(name) for name in ("ranks", "measure", "gpu", "overwrite")}
    if not process_group.is_main():
        return
    with user_errors(cfg, options.words):
        from bumblebee.models.load_context import shapes_only
        from bumblebee.preview.preview import collect
        from bumblebee.preview.preview_report import print_report
        from bumblebee.recipe import build

        with shapes_only():
            preview = collect(build(cfg, nullcontext), cfg, **choices)
        print_report(preview, samples)
