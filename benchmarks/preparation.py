"""How fast is chat data prepared for training: rendered, targets marked, tokenised, packed?

    python benchmarks/preparation.py                 a few minutes; needs transformers and datasets (pip install .[bench])

Ours is ``datamodules.SFT.setup`` with an empty cache, reading and packing included. The peer is what people write with
transformers and datasets: ``map(num_proc=...)`` over ``apply_chat_template`` with the mask of the assistant's tokens, reading
included, packing not. Both get the same file of questions about Python with whole docstrings as answers, and the same
tokenizer and template (theirs with the marks that transformers needs to find the assistant's turns). Ids and masks are
compared first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import header, median, table

from bumblebee.tokenizer import Tokenizer
from datamodules import SFT, python_docs, python_docs_pairs, workers

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)


def prepare(folder: Path, phrasings: int, vocab_size: int) -> tuple[Path, Path]:
    """The file and the tokenizer's folder."""
    file, tokenizer = folder / "chats.jsonl", folder / "tokenizer"
    with open(file, "w", encoding="utf-8") as out:
        for record in python_docs_pairs.conversations("whole", phrasings):
            out.write(json.dumps(record) + "\n")
    Tokenizer.train(python_docs.documents(), vocab_size).save_pretrained(tokenizer)
    return file, tokenizer


def ours(file: Path, tokenizer: Path, cache: Path) -> tuple[float, SFT]:
    """Seconds, and what was prepared."""
    began = time.perf_counter()
    data = SFT(str(file), str(tokenizer), 1024, cache_dir=str(cache))
    data.setup(seed=0)
    return time.perf_counter() - began, data


def theirs(file: Path, tokenizer: Path, cache: Path, processes: int) -> tuple[float, Any]:
    """Seconds, and what was prepared."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    began = time.perf_counter()
    peer = transformers.AutoTokenizer.from_pretrained(tokenizer)

    def encoded(record: dict[str, Any]) -> dict[str, Any]:
        chat = peer.apply_chat_template(
            record["messages"], chat_template=TEMPLATE, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": chat["input_ids"], "assistant_masks": chat["assistant_masks"]}

    records = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
    made = records.map(encoded, num_proc=processes, remove_columns=["messages"])
    return time.perf_counter() - began, made


def check(data: SFT, peer: Any) -> None:
    """The same ids and targets, record by record."""
    cache = data.cache
    assert len(cache) == len(peer), (len(cache), len(peer))
    for number, record in enumerate(peer):
        begin, end = int(cache.begins[number]), int(cache.ends[number])
        assert cache.tokens[begin:end].tolist() == record["input_ids"], number
        assert cache.trained(begin, end).astype(int).tolist() == record["assistant_masks"], number


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--phrasings", type=int, default=python_docs_pairs.PHRASINGS)
    parser.add_argument("--vocab_size", type=int, default=16_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="of the peer; ours takes one for each core")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, tokenizer = prepare(folder, options.phrasings, options.vocab_size)
        times: dict[str, list[float]] = {"ours": [], "ours, one process": [], "theirs": []}
        for turn in range(options.turns):
            seconds, data = ours(file, tokenizer, folder / f"ours-{turn}")
            times["ours"].append(seconds)
            seconds, peer = theirs(file, tokenizer, folder / f"theirs-{turn}", options.processes)
            times["theirs"].append(seconds)
            if not turn:
                check(data, peer)
            enough, workers.ENOUGH = workers.ENOUGH, sys.maxsize
            times["ours, one process"].append(ours(file, tokenizer, folder / f"single-{turn}")[0])
            workers.ENOUGH = enough
        again, _ = ours(file, tokenizer, folder / "ours-0")
        tokens, size = len(data.cache.tokens), file.stat().st_size
    print(header("Preparing chat data"))
    print(f"{len(data.cache)} conversations, {size / 1e6:.1f} MB, {tokens} tokens; ids and masks are equal.\n")
    peer_name = f"transformers + datasets, map(num_proc={options.processes})"
    rows = [
        [
            what,
            f"{median(times[key]):.2f}",
            f"{tokens / median(times[key]) / 1e3:.0f}",
            ", ".join(f"{t:.2f}" for t in times[key]),
        ]
        for what, key in (("SFT, packed", "ours"), ("SFT, packed, one process", "ours, one process"), (peer_name, "theirs"))
    ]
    print(
        table(
            ["what", "seconds (median)", "1000 tokens/s", "all runs, s"], [*rows, ["SFT, second start", f"{again:.2f}", "", ""]]
        )
    )


if __name__ == "__main__":
    main()
