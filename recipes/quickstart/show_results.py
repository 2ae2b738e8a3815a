"""Print the quickstart's results as one table, from the results.json files that `bumblebee evaluate --output` has written.

python recipes/quickstart/show_results.py --runs runs/quickstart
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# Label, folder of the results below evaluation/, task, metric, and whether it is a share.
ROWS = (
    (
        "held-out documents, bits per byte: the model",
        "pretrain",
        "perplexity:documents_validation",
        "bits_per_byte",
        False,
    ),
    ("questions answered exactly: all", "questions", "exact_match", "exact_match", True),
    ("  first question of a conversation", "questions", "exact_match", "single_turn", True),
    ("  follow-up questions", "questions", "exact_match", "multi_turn", True),
    ("multiple choice, four answers", "chat", "multiple_choice", "acc", True),
    ("held-out preferences: more probable, before DPO", "sft", "preference_accuracy:preferences_validation", "acc", True),
    ("held-out preferences: more probable, after DPO", "chat", "preference_accuracy", "acc", True),
    ("held-out preferences: higher reward by DPO", "chat", "preference_accuracy", "reward_acc", True),
)


def lines(runs: Path) -> list[str]:
    """The lines of the table, each a label with a value and its standard error."""
    table = []
    for label, folder, task, metric, is_share in ROWS:
        results: dict[str, Any] = json.loads((runs / "evaluation" / folder / "results.json").read_text())
        estimate = results["tasks"][task]["metrics"][metric]
        value, error = estimate["value"], estimate["stderr"]
        text = f"{value:6.1%} ± {error:.1%}" if is_share else f"{value:6.3f} ± {error:.3f}"
        table.append(f"  {label:<54}{text}")
    table.insert(1, f"  {'held-out documents, bits per byte: bigrams':<54}{bigrams(runs):6.3f}")
    return table


def bigrams(runs: Path) -> float:
    """Bits per byte of the bigram model that callbacks.BigramBaseline has fitted to the pretraining data."""
    metrics = [json.loads(line) for line in (runs / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    return next(line["bigram_bits_per_byte"] for line in metrics if "bigram_bits_per_byte" in line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the quickstart's results as a table.", allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=Path("runs/quickstart"), help="folder of the three stages")
    print("\n".join(lines(parser.parse_args().runs)))
