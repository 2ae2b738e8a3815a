"""``bumblebee tokenizer``: train a byte-level BPE tokenizer on text files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from bumblebee.cli.errors.value_errors import user_errors
from bumblebee.cli.parser import Parser, command_parser


def parser() -> Parser:
    """Return the options of the command."""
    options = command_parser("tokenizer")
    options.add_argument("--files", type=str | list[str], required=True, help="text files, as for data.files")
    options.add_argument("--vocab_size", type=int, required=True, help="tokens, including 256 bytes and 3 special tokens")
    options.add_argument("--output", type=str, required=True, help="folder for tokenizer.json and tokenizer_config.json")
    options.add_argument("--overwrite", type=bool, default=False, help="replace an existing tokenizer")
    return options


def run(words: Sequence[str]) -> None:
    """Execute the command."""
    options = parser()
    cfg = options.parse(words)
    with user_errors(cfg, options.words):
        from bumblebee.tokenizer.tokenizer import Tokenizer
        from datamodules import record_files

        if (Path(cfg.output) / "tokenizer.json").exists() and not cfg.overwrite:
            raise ValueError(f"output: {cfg.output} already contains a tokenizer; replace it with --overwrite")
        texts = (record_files.text_of(record) for file in record_files.expand(cfg.files) for record in record_files.read(file))
        tokenizer = Tokenizer.train(texts, cfg.vocab_size, show_progress=sys.stderr.isatty())
        tokenizer.save_pretrained(cfg.output)
    fewer = tokenizer.vocab_size < cfg.vocab_size
    reason = f" (requested {cfg.vocab_size}, but the files have no more pairs to merge)" if fewer else ""
    print(f"{tokenizer.vocab_size} tokens in {cfg.output}{reason}")
