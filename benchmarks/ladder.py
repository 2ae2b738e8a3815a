"""A size ladder on a CPU: the loss that ``bumblebee sweep`` predicts for an untrained size, and the loss of training it.

    OMP_NUM_THREADS=1 python benchmarks/ladder.py [--tokens_per_parameter 20] [--lr 6e-3] [--seed 42] [--folder FOLDER]

Four sizes of the quickstart's model with a vocabulary of 512, 20 tokens per parameter, and a fifth that is predicted. The text
is the source of Python's standard library, without its tests: more than the largest size reads, so that nothing is read twice.
The sweep and the training of the fifth size are commands in processes of their own; the losses do not depend on the load of the
machine. The same runs also give the predictions from three of the sizes. Takes some minutes on two idle cores. ``--folder``
keeps the runs; what is in it already is not run again.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import sysconfig
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from common import BARE, final_validation_loss, header, parser, table

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = (16, 24, 32, 48)
PREDICTED = 64
CHARACTERS, VALIDATION_CHARACTERS = 8_000_000, 150_000


def sources() -> Iterator[str]:
    """Modules of the standard library in a random order that is the same each time."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [
        file
        for file in sorted(folder.rglob("*.py"))
        if not {"site-packages", "dist-packages", "test", "tests"} & set(file.parts)
    ]
    random.Random(0).shuffle(files)
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")
        if 500 < len(text) < 60_000:
            yield text


def write(file: Path, texts: Iterator[str], characters: int) -> None:
    """Write texts as JSON Lines until there are as many characters."""
    with open(file, "w", encoding="utf-8") as lines:
        while characters > 0 and (text := next(texts, None)):
            lines.write(json.dumps({"text": text}) + "\n")
            characters -= len(text)


def bumblebee(*words: object) -> None:
    """Run a command; its output goes to stderr."""
    subprocess.run([sys.executable, "-m", "bumblebee", *map(str, words)], cwd=ROOT, stdout=sys.stderr, check=True)


def size(width: int) -> dict[str, int]:
    """The options of a size: two layers, heads of 16."""
    heads = width // 16 if width % 16 == 0 else 2
    shape = {"hidden_size": width, "intermediate_size": width * 11 // 4 // 4 * 4, "num_hidden_layers": 2,
             "num_attention_heads": heads, "num_key_value_heads": 1}  # fmt: skip
    return {f"task.model.config.{name}": value for name, value in shape.items()}


def recipe(folder: Path, args: Namespace) -> list[object]:
    """The quickstart's recipe with other data, a small vocabulary and a single validation at the end."""
    return [
        "--config", "recipes/quickstart/pretrain.yaml", "--seed", args.seed, "--data.files", folder / "train.jsonl",
        "--data.validation_files", folder / "validation.jsonl", "--data.tokenizer", folder / "tokenizer",
        "--data.max_length", 128, "--task.model.config.vocab_size", 512, "--task.model.config.head_dim", 16,
        "--trainer.precision", "fp32", "--trainer.micro_batch_size", 8, "--optimizer.lr", args.lr,
        "--schedule.warmup_ratio", 0.1, *BARE,
    ]  # fmt: skip


def run(folder: Path, args: Namespace) -> tuple[dict, float]:
    """Sweep, then train the predicted size; returns ladder.json and the loss of that size."""
    if not (folder / "tokenizer").exists():
        texts = sources()
        write(folder / "validation.jsonl", texts, VALIDATION_CHARACTERS)
        write(folder / "train.jsonl", texts, CHARACTERS)
        bumblebee("tokenizer", "--files", folder / "train.jsonl", "--vocab_size", 512, "--output", folder / "tokenizer")
    ladder = {"tokens_per_parameter": args.tokens_per_parameter, "sizes": list(map(size, WIDTHS)), "predict": [size(PREDICTED)]}
    file = folder / "ladder.yaml"  # JSON is YAML
    file.write_text(json.dumps({"metric": {"name": "validation_loss", "goal": "minimize"}, "ladder": ladder}))
    bumblebee("sweep", *recipe(folder, args), "--sweep", file, "--output_dir", folder / "runs", "--resume", "true")
    report = json.loads((folder / "runs/sweep/ladder.json").read_text())
    rung = report["predictions"][0]["rung"]
    options = [word for key, value in rung["options"].items() for word in (f"--{key}", value)]
    predicted = folder / "predicted"
    if final_validation_loss(predicted) is None:
        words = [*recipe(folder, args), *options, "--trainer.max_steps", rung["steps"], "--output_dir", predicted]
        bumblebee("fit", *words, "--overwrite", "true")
    loss = final_validation_loss(predicted)
    assert loss is not None
    return report, loss


def size_rows(report: Mapping, truth: float) -> list[Sequence[object]]:
    """Rows of all trained sizes, the predicted one last."""
    rung = report["predictions"][0]["rung"]
    runs = [*report["runs"], {**rung, "loss": truth}]
    widths = (*WIDTHS, PREDICTED)
    return [
        (width, round(run["parameters"]), round(run["tokens"]), f"{run['loss']:.4f}")
        for width, run in zip(widths, runs, strict=True)
    ]


def from_fewer(report: Mapping, truth: float) -> list[Sequence[object]]:
    """Rows of the predictions by laws that are fitted to three or four of the sizes."""
    from bumblebee.sweep.ladder.scaling_law import TrainedSize, fit

    runs = [TrainedSize(run["parameters"], run["tokens"], run["loss"]) for run in report["runs"]]
    rung = report["predictions"][0]["rung"]
    rows = []
    for chosen in (each for count in (4, 3) for each in combinations(range(len(runs)), count)):
        law = fit([runs[index] for index in chosen])
        loss = law.loss(rung["parameters"], rung["tokens"])
        widths = ", ".join(str(WIDTHS[index]) for index in chosen)
        rows.append((widths, law.formula(), f"{loss:.4f}", f"{truth:.4f}", f"{loss / truth - 1:+.2%}"))
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens_per_parameter", type=float, default=20)
    options.add_argument("--lr", type=float, default=6e-3)
    options.add_argument("--seed", type=int, default=42)
    options.add_argument("--folder", type=Path)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        report, truth = run(folder, args)
    print(header("A size ladder: predicted and trained loss"))
    print(table(("width", "N", "D", "validation_loss"), size_rows(report, truth)))
    prediction = report["predictions"][0]
    band = f"{prediction['loss']:.4f} ({prediction['low']:.4f} to {prediction['high']:.4f})"
    error = f"{prediction['loss'] / truth - 1:+.2%}"
    print(f"\nPredicted by the sweep for width {PREDICTED}: {band}, {error} from the loss of training it.")
    print("From all sizes and from each three of them:\n")
    print(table(("widths", "law", "predicted", "trained", "error"), from_fewer(report, truth)))


if __name__ == "__main__":
    main()
