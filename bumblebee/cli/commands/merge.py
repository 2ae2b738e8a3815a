"""``bumblebee merge``: merge a LoRA adapter into its base model."""

from __future__ import annotations

from collections.abc import Sequence

from bumblebee.cli.errors.value_errors import user_errors
from bumblebee.cli.parser import Parser, command_parser


def parser() -> Parser:
    """Return the options of the command."""
    options = command_parser("merge")
    options.add_argument("--adapter", type=str, required=True, help="adapter folder")
    options.add_argument("--output", type=str, required=True, help="model folder to write")
    options.add_argument("--base", type=str | None, default=None, help="base model; null: the folder named by the adapter")
    options.add_argument("--dtype", type=str, default="auto", help="auto (the base model's), float32, bfloat16 or float16")
    options.add_argument("--max_shard_size", type=str, default="5GB", help="maximum size of a safetensors file")
    options.add_argument("--overwrite", type=bool, default=False, help="replace an existing model")
    check_help = "compare the logits of the merged model with those of base and adapter; loads both"
    options.add_argument("--check", type=bool, default=True, help=check_help)
    options.add_argument("--trust_remote_code", type=bool, default=False, help="run code that the folders name, for the check")
    return options


def run(words: Sequence[str]) -> None:
    """Execute the command."""
    options = parser()
    cfg = options.parse(words)
    with user_errors(cfg, options.words):
        from bumblebee.checkpoint.merge import merge

        merge(cfg.adapter, cfg.output, cfg.base, cfg.dtype, cfg.max_shard_size, cfg.overwrite)
    print(f"model folder: {cfg.output}", flush=True)
    if cfg.check:
        with user_errors(cfg, options.words):
            from bumblebee.lora import logit_differences

            by_dtype = logit_differences(cfg.output, cfg.adapter, cfg.base, cfg.trust_remote_code)
        for dtype, (difference, largest) in by_dtype.items():
            print(f"{dtype}: maximum logit difference {difference:.3g}, maximum logit {largest:.3g}", flush=True)
