"""Builds caches in processes of their own, for test_building.py: with little memory, or to be killed.

python building.py FOLDER TOKENIZER MEGABYTES FILE
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from bumblebee.tokenizer.tokenizer import Tokenizer
from datamodules import record_files
from datamodules.cache_writer import build
from datamodules.token_cache import TokenCache, one_at_a_time, remove_leftovers
from datamodules.tokenize import TextEncoder


def in_use() -> int:
    """Bytes that count towards RLIMIT_DATA."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmData")) * 1024


def main(folder: str, tokenizer: str, megabytes: str, file: str, processes: str) -> None:
    """Build, and say what it needed."""
    encoder = TextEncoder(tokenizer, Tokenizer.from_pretrained(tokenizer))
    encoder.tokenizer.encode_batch(["warm up", "the threads"])
    if int(megabytes):
        limit = in_use() + int(megabytes) * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with one_at_a_time(Path(folder)):
        remove_leftovers(Path(folder).parent)
        print("begins", flush=True)
        build(Path(folder), record_files.read(file), encoder, [file], skip=False, show=False, processes=int(processes))
    cache = TokenCache(Path(folder))
    print(len(cache), int(cache.tokens[-1]), int(cache.ends[-1]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
