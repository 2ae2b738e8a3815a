"""How fast is chat data prepared for training: rendered, targets marked, tokenised, packed?

    python benchmarks/preparation.py                 a few minutes; needs transformers and datasets (pip install .[bench])

Ours is ``datamodules.SFT.setup`` with an empty cache, reading and packing included. The peer is what people write with
transformers and datasets: ``map(num_proc=...)`` over ``apply_chat_template`` with the mask of the assistant's tokens, reading
included, packing not. Both get the same file of questions about Python with whole docstrings as answers, and the same
tokenizer and template (theirs with the marks that transformers needs to find the assistant's turns). Ids and masks are
compared first. Processor seconds, of all processes together, tell more than the clock where others use the machine as well.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import header, median, table

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


def prepare(folder: Path, phrasings: int, vocab_size: int) -> tuple[Path, Path]:
    """The file and the tokenizer's folder."""
    file, tokenizer = folder / "chats.jsonl", folder / "tokenizer"
    entries = stdlib_docs.entries()
    with open(file, "w", encoding="utf-8") as out:
        for record in chats(entries, phrasings):
            out.write(json.dumps(record) + "\n")
    Tokenizer.train([entry.document for entry in entries], vocab_size).save_pretrained(tokenizer)
    return file, tokenizer


def chats(entries: list[stdlib_docs.Entry], phrasings: int) -> Iterator[dict[str, Any]]:
    """Conversations of one question, answered by the whole docstring."""
    askable = questions.askable(entries)
    texts = {entry.name: entry.text for entry, _ in askable}
    for subject in questions.select(askable, len(askable)):
        for question in subject.phrasings(phrasings):
            answer = {"role": "assistant", "content": texts[subject.name]}
            yield {"messages": [{"role": "user", "content": question}, answer]}


Seconds = tuple[float, float]  # by the clock; of processors


def now() -> Seconds:
    """Both, of this process and its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in used)


def since(began: Seconds) -> Seconds:
    """What has been spent."""
    clock, processors = now()
    return clock - began[0], processors - began[1]


def ours(file: Path, tokenizer: Path, cache: Path) -> tuple[Seconds, SFT]:
    """What it took, and what was prepared."""
    began = now()
    data = SFT(str(file), str(tokenizer), 1024, cache_dir=str(cache))
    data.setup(seed=0)
    return since(began), data


def theirs(file: Path, tokenizer: Path, cache: Path, processes: int) -> tuple[Seconds, Any]:
    """What it took, and what was prepared."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    began = now()
    peer = transformers.AutoTokenizer.from_pretrained(tokenizer)

    def encoded(record: dict[str, Any]) -> dict[str, Any]:
        chat = peer.apply_chat_template(
            record["messages"], chat_template=TEMPLATE, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": chat["input_ids"], "assistant_masks": chat["assistant_masks"]}

    records = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
    made = records.map(encoded, num_proc=processes, remove_columns=["messages"])
    return since(began), made


def check(data: SFT, peer: Any) -> None:
    """The same ids and targets, record by record."""
    cache = data.cache
    assert len(cache) == len(peer), (len(cache), len(peer))
    for number, record in enumerate(peer):
        begin, end = int(cache.begins[number]), int(cache.ends[number])
        assert cache.tokens[begin:end].tolist() == record["input_ids"], number
        assert cache.target_mask(begin, end).astype(int).tolist() == record["assistant_masks"], number


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--phrasings", type=int, default=questions.MAX_PHRASINGS)
    parser.add_argument("--vocab_size", type=int, default=16_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="of the peer; ours takes one for each core")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, tokenizer = prepare(folder, options.phrasings, options.vocab_size)
        kinds = ("SFT, packed", "SFT, packed, one process", f"transformers + datasets, map(num_proc={options.processes})")
        runs: dict[str, list[Seconds]] = {kind: [] for kind in kinds}
        theirs(file, tokenizer, folder / "warm", options.processes)  # imports
        for turn in range(options.turns):
            seconds, data = ours(file, tokenizer, folder / f"ours-{turn}")
            runs[kinds[0]].append(seconds)
            enough, worker_pool.MIN_BYTES = worker_pool.MIN_BYTES, sys.maxsize
            runs[kinds[1]].append(ours(file, tokenizer, folder / f"single-{turn}")[0])
            worker_pool.MIN_BYTES = enough
            seconds, peer = theirs(file, tokenizer, folder / f"theirs-{turn}", options.processes)
            runs[kinds[2]].append(seconds)
            if not turn:
                check(data, peer)
        again, _ = ours(file, tokenizer, folder / "ours-0")
        tokens, size = len(data.cache.tokens), file.stat().st_size
    print(header("Preparing chat data"))
    print(f"{len(data.cache)} conversations, {size / 1e6:.1f} MB, {tokens} tokens; ids and masks are equal.\n")
    rows = [row(kind, found, tokens) for kind, found in runs.items()]
    print(table(["what", "s", "all", "1000 tokens/s", "processor s", "1000 tokens/processor s"], rows))
    print(f"\nMedians of {options.turns}. A second start of SFT takes {again[0]:.2f} s.")


def row(kind: str, found: list[Seconds], tokens: int) -> list[str]:
    """A line of the table."""
    clock, processors = (median(values) for values in zip(*found, strict=True))
    every = ", ".join(f"{seconds:.1f}" for seconds, _ in found)
    return [kind, f"{clock:.1f}", every, f"{tokens / clock / 1e3:.0f}", f"{processors:.1f}", f"{tokens / processors / 1e3:.0f}"]


if __name__ == "__main__":
    main()
