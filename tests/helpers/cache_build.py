"""Writes a token cache in a process of its own, with limited memory or to be killed, for test_worker_pool.py.

python cache_build.py FOLDER TOKENIZER MEGABYTES FILE WORKERS
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from bumblebee.tokenizer.tokenizer import Tokenizer
from datamodules import record_files
from datamodules.token_cache import TokenCache, remove_unfinished, write_lock, write_token_cache
from datamodules.tokenize import TextTokenizer


def data_size() -> int:
    """Bytes that count towards RLIMIT_DATA."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmData")) * 1024


def main(folder: str, tokenizer: str, megabytes: str, file: str, workers: str) -> None:
    """Write the cache, then print its sizes."""
    encoder = TextTokenizer(tokenizer, Tokenizer.from_pretrained(tokenizer))
    encoder.tokenizer.encode_batch(["warm up", "the threads"])
    if int(megabytes):
        limit = data_size() + int(megabytes) * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with write_lock(Path(folder)):
        remove_unfinished(Path(folder).parent)
        print("begins", flush=True)
        write_token_cache(Path(folder), record_files.read(file), encoder, [file], False, False, int(workers))
    cache = TokenCache(Path(folder))
    print(len(cache), int(cache.tokens[-1]), int(cache.ends[-1]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
