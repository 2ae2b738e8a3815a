"""``bumblebee plot``: compare the metrics of runs in one figure and one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from bumblebee.cli.errors.value_errors import user_errors
from bumblebee.cli.parser import Parser, command_parser


def parser() -> Parser:
    """Return the options of the command."""
    options = command_parser("plot")
    options.add_argument("runs", type=str, nargs="+", help="output folders of runs")
    options.add_argument("--output", type=str, default="comparison.png", help="image to write; the suffix sets the format")
    metrics_help = "metrics of metrics.jsonl, one panel each; null: the reward of GRPO runs, the loss of others"
    options.add_argument("--metrics", type=str | list[str] | None, default=None, help=metrics_help)
    options.add_argument("--along", type=Literal["step", "tokens", "epoch", "seconds"], default="step", help="x axis")
    smoothing_help = "weight of the previous value in the exponential moving average; 0 turns smoothing off"
    options.add_argument("--smoothing", type=float, default=0.9, help=smoothing_help)
    return options


def run(words: Sequence[str]) -> None:
    """Execute the command."""
    options = parser()
    cfg = options.parse(words)
    with user_errors(cfg, options.words):
        from bumblebee.plotting.run_comparison import RunComparison

        metrics = [cfg.metrics] if isinstance(cfg.metrics, str) else cfg.metrics
        comparison = RunComparison(cfg.runs, metrics, cfg.along, cfg.smoothing)
        comparison.plot(cfg.output)
    print(comparison.table())
    print(f"figure: {cfg.output}")
