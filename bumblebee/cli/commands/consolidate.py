"""``bumblebee consolidate``: convert the shards of a checkpoint to a model folder."""

from __future__ import annotations

from collections.abc import Sequence

from bumblebee.cli.errors.value_errors import user_errors
from bumblebee.cli.parser import Parser, command_parser


def parser() -> Parser:
    """Return the options of the command."""
    options = command_parser("consolidate")
    options.add_argument("checkpoint", type=str, help="a run's checkpoint-<step>")
    options.add_argument("--output", type=str, required=True, help="model folder to write")
    options.add_argument("--dtype", type=str, default="auto", help="auto (as trained), float32, bfloat16 or float16")
    options.add_argument("--max_shard_size", type=str, default="5GB", help="maximum size of a safetensors file")
    return options


def run(words: Sequence[str]) -> None:
    """Execute the command."""
    options = parser()
    cfg = options.parse(words)
    with user_errors(cfg, options.words):
        from bumblebee.checkpoint.consolidate import consolidate

        consolidate(cfg.checkpoint, cfg.output, cfg.dtype, cfg.max_shard_size)
    print(f"model folder: {cfg.output}")
