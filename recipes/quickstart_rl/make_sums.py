"""Write the data of `make quickstart-rl`: sums of a number of two digits and a digit, and the answers of a careless teacher.

    python recipes/quickstart_rl/make_sums.py --output runs/quickstart_rl/data

The teacher knows the sum, but adds a random error to most answers (OFFSETS), so that a model that imitates him has learnt
to add, and to be wrong. Every file is JSON Lines in a format that docs/data.md describes:

    answers.jsonl          SFT: {"prompt": "47+8", "completion": "56"}; each training question several times
    questions.jsonl        GRPO: {"prompt": "47+8"}; the training questions, without answers
    held_out.jsonl         evaluation: questions that are in neither of the other files
    tokenizer.txt          all characters, for the tokenizer

The content depends only on --seed.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

FIRST, SECOND = range(10, 89), range(1, 10)  # so that all answers have two digits
OFFSETS = {0: 0.15, 1: 0.35, -1: 0.25, 2: 0.25}  # how often the teacher's answer differs from the sum by this much
HELD_OUT = 111
REPEATS = 150  # answers of the teacher to a question


def make_files(seed: int, repeats: int = REPEATS) -> dict[str, list[Mapping[str, str]]]:
    """The records of each file, by file name."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in FIRST for b in SECOND]
    rng.shuffle(pairs)
    held_out, training = pairs[:HELD_OUT], pairs[HELD_OUT:]
    answers = [
        (a, b, a + b + offset) for a, b in training for offset in rng.choices([*OFFSETS], [*OFFSETS.values()], k=repeats)
    ]
    rng.shuffle(answers)
    return {
        "answers.jsonl": [{"prompt": f"{a}+{b}", "completion": str(answer)} for a, b, answer in answers],
        "questions.jsonl": [{"prompt": f"{a}+{b}"} for a, b in training],
        "held_out.jsonl": [{"prompt": f"{a}+{b}"} for a, b in held_out],
    }


def write_jsonl(path: Path, records: Iterable[Mapping[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the sums of make quickstart-rl as JSON Lines.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart_rl/data"), help="folder of the files")
    parser.add_argument("--seed", type=int, default=42, help="of the held-out questions and the teacher's errors")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name, records in make_files(options.seed).items():
        write_jsonl(options.output / name, records)
        print(f"{options.output / name}: {len(records)} records", flush=True)
    (options.output / "tokenizer.txt").write_text("0123456789+=", encoding="utf-8")


if __name__ == "__main__":
    main()
