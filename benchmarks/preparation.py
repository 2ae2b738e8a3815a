"""Measure the preparation of chat data for training: rendering, assistant masks, tokenization, packing.

    python benchmarks/preparation.py [--turns N] [--processes N]

Takes a few minutes; needs transformers and datasets (``pip install .[bench]``).

Ours is ``datamodules.SFT.setup`` with an empty cache, including reading and packing. The peer is the usual code with
transformers and datasets: ``map(num_proc=...)`` over ``apply_chat_template`` with the assistant mask, including reading,
without packing. Both get the same file of questions about Python with whole docstrings as answers, and the same tokenizer and
template (the peer's with the generation marks that transformers needs for the mask). Ids and masks are compared first. CPU
seconds, of all processes together, say more than wall-clock time on a shared machine.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import header, median, parser, table

from bumblebee.tokenizer.tokenizer import Tokenizer
from datamodules import SFT, worker_pool

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "quickstart"))
import questions  # noqa: E402
import stdlib_docs  # noqa: E402

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)


def make_files(folder: Path, phrasings: int, vocab_size: int) -> tuple[Path, Path]:
    """Write the data file and the tokenizer folder."""
    file, tokenizer = folder / "chats.jsonl", folder / "tokenizer"
    entries = stdlib_docs.entries()
    with open(file, "w", encoding="utf-8") as out:
        for record in chats(entries, phrasings):
            out.write(json.dumps(record) + "\n")
    Tokenizer.train([entry.document for entry in entries], vocab_size).save_pretrained(tokenizer)
    return file, tokenizer


def chats(entries: list[stdlib_docs.Entry], phrasings: int) -> Iterator[dict[str, Any]]:
    """Single-turn conversations, answered by the whole docstring."""
    askable = questions.askable(entries)
    texts = {entry.name: entry.text for entry, _ in askable}
    for subject in questions.select(askable, len(askable)):
        for question in subject.phrasings(phrasings):
            answer = {"role": "assistant", "content": texts[subject.name]}
            yield {"messages": [{"role": "user", "content": question}, answer]}


Seconds = tuple[float, float]  # wall-clock, CPU


def now() -> Seconds:
    """Wall-clock time, and CPU time of this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in used)


def since(began: Seconds) -> Seconds:
    """Seconds since a call of ``now``."""
    wall, cpu = now()
    return wall - began[0], cpu - began[1]


def ours(file: Path, tokenizer: Path, cache: Path) -> tuple[Seconds, SFT]:
    """Prepare the data with ``SFT``."""
    began = now()
    data = SFT(str(file), str(tokenizer), 1024, cache_dir=str(cache))
    data.setup(seed=0)
    return since(began), data


def theirs(file: Path, tokenizer: Path, cache: Path, processes: int) -> tuple[Seconds, Any]:
    """Prepare the data with transformers and datasets."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    began = now()
    peer = transformers.AutoTokenizer.from_pretrained(tokenizer)

    def encode(record: dict[str, Any]) -> dict[str, Any]:
        chat = peer.apply_chat_template(
            record["messages"], chat_template=TEMPLATE, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": chat["input_ids"], "assistant_masks": chat["assistant_masks"]}

    records = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
    prepared = records.map(encode, num_proc=processes, remove_columns=["messages"])
    return since(began), prepared


def check(data: SFT, peer: Any) -> None:
    """Assert equal ids and masks, record by record."""
    cache = data.cache
    assert len(cache) == len(peer), (len(cache), len(peer))
    for number, record in enumerate(peer):
        begin, end = int(cache.begins[number]), int(cache.ends[number])
        assert cache.tokens[begin:end].tolist() == record["input_ids"], number
        assert cache.target_mask(begin, end).astype(int).tolist() == record["assistant_masks"], number


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--phrasings", type=int, default=questions.MAX_PHRASINGS)
    arguments.add_argument("--vocab_size", type=int, default=16_000)
    arguments.add_argument("--turns", type=int, default=3)
    arguments.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="of the peer; ours uses one per core")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, tokenizer = make_files(folder, options.phrasings, options.vocab_size)
        variants = ("SFT, packed", "SFT, packed, one process", f"transformers + datasets, map(num_proc={options.processes})")
        runs: dict[str, list[Seconds]] = {variant: [] for variant in variants}
        theirs(file, tokenizer, folder / "warm", options.processes)  # imports
        for turn in range(options.turns):
            seconds, data = ours(file, tokenizer, folder / f"ours-{turn}")
            runs[variants[0]].append(seconds)
            min_bytes, worker_pool.MIN_BYTES = worker_pool.MIN_BYTES, sys.maxsize
            runs[variants[1]].append(ours(file, tokenizer, folder / f"single-{turn}")[0])
            worker_pool.MIN_BYTES = min_bytes
            seconds, peer = theirs(file, tokenizer, folder / f"theirs-{turn}", options.processes)
            runs[variants[2]].append(seconds)
            if not turn:
                check(data, peer)
        again, _ = ours(file, tokenizer, folder / "ours-0")
        tokens, size = len(data.cache.tokens), file.stat().st_size
    print(header("Preparing chat data"))
    print(f"{len(data.cache)} conversations, {size / 1e6:.1f} MB, {tokens} tokens; ids and masks are equal.\n")
    rows = [row(variant, times, tokens) for variant, times in runs.items()]
    print(table(["", "s", "all runs, s", "1000 tokens/s", "CPU s", "1000 tokens/CPU s"], rows))
    print(f"\nMedians of {options.turns}. With a warm cache, SFT takes {again[0]:.2f} s.")


def row(variant: str, times: list[Seconds], tokens: int) -> list[str]:
    """A row of the table."""
    wall, cpu = (median(values) for values in zip(*times, strict=True))
    all_runs = ", ".join(f"{seconds:.1f}" for seconds, _ in times)
    return [variant, f"{wall:.1f}", all_runs, f"{tokens / wall / 1e3:.0f}", f"{cpu:.1f}", f"{tokens / cpu / 1e3:.0f}"]


if __name__ == "__main__":
    main()
