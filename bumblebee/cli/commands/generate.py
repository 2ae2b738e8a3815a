"""``bumblebee generate``: generate text from a prompt or a file of prompts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from bumblebee.cli.errors.reporting import run_errors
from bumblebee.cli.errors.value_errors import user_errors
from bumblebee.cli.parser import Parser, command_parser
from bumblebee.cli.sampling_options import add_sampling_options, explicit_sampling


def parser() -> Parser:
    """Return the options of the command."""
    options = command_parser("generate")
    options.add_argument("--model", type=str, required=True, help="model folder")
    options.add_argument("--prompt", type=str | None, default=None, help="text to continue; with chat the user's message")
    prompts_help = 'file of prompts: a .txt with one per line, or a .jsonl with {"prompt": ...} or {"messages": [...]}'
    options.add_argument("--prompts", type=str | None, default=None, help=prompts_help)
    options.add_argument("--output", type=str | None, default=None, help="JSON Lines file to write; null: print")
    options.add_argument("--overwrite", type=bool, default=False, help="replace an existing output file")
    options.add_argument("--num_samples", type=int, default=1, help="completions per prompt")
    options.add_argument("--chat", type=bool, default=False, help="apply the tokenizer's chat template to prompts")
    options.add_argument("--system", type=str | None, default=None, help="system prompt of chats that have none")
    options.add_argument("--stream", type=bool, default=True, help="print text as it is generated")
    options.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    options.add_argument("--dtype", type=str, default="auto", help="auto (as stored), float32, bfloat16 or float16")
    map_help = "auto: spread the layers of a model over all GPUs if it does not fit on one; null: use one device"
    options.add_argument("--device_map", type=Literal["auto"] | None, default=None, help=map_help)
    quantize_help = "int8 or int4 weights, quantized while loading; null keeps them as stored"
    options.add_argument("--quantize", type=Literal["int8", "int4"] | None, default=None, help=quantize_help)
    options.add_argument("--trust_remote_code", type=bool, default=False, help="run code that the model folder names or holds")
    add_sampling_options(options)
    return options


def run(words: Sequence[str]) -> None:
    """Execute the command."""
    options = parser()
    cfg = options.parse(words)
    with user_errors(cfg, options.words):
        from bumblebee.inference.batch import BatchGeneration, PromptRecord, check_files, open_output
        from bumblebee.inference.generator import Generator
        from datamodules.prompt_files import read_prompts

        sampling = explicit_sampling(cfg)
        check_files(cfg.prompt, cfg.prompts, cfg.output, cfg.overwrite)
        as_json = cfg.prompt is None or cfg.output is not None or cfg.num_samples > 1 or "logprobs" in sampling
        prompts = list(read_prompts(cfg.prompts)) if cfg.prompt is None else [PromptRecord.of(cfg.prompt)]
        generator = Generator.from_pretrained(
            cfg.model, cfg.device, cfg.dtype, cfg.device_map, cfg.trust_remote_code, cfg.quantize
        )
        params = replace(generator.defaults, **sampling)
        batch = BatchGeneration(generator, prompts, params, cfg.num_samples, cfg.chat, cfg.system)
        file = sys.stdout.buffer if cfg.output is None else open_output(cfg.output, cfg.overwrite)
    with run_errors():
        if as_json:
            batch.write(file)
        else:
            batch.print("" if cfg.chat else cfg.prompt, cfg.stream)
