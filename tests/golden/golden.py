"""Golden losses of a tiny run of each task, as text.

    make golden        rewrites the files, after a change that is meant to change numbers; review the difference

A file has a line for each step: step, loss and gradient norm with six significant digits, enough to detect any change of the
arithmetic, and few enough to be equal on other processors. A step without targets has zeros.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
from helpers.training_runs import train  # noqa: E402

ADAM = ("AdamW", {"lr": 1e-2, "weight_decay": 0.1})
DPO = {"task": ("DPO", {"sft_weight": 0.1}), "data": ("Pairs", {"samples": 11, "empty": [2]})}
CHATS = {"data": ("Chats", {"file": str(HERE / "chats.jsonl")}), "model": {"vocab_size": 400}}
RUNS = {
    "language_modeling-fp32-stage0": {"precision": "fp32", "zero_stage": 0},
    "language_modeling-fp32-stage3": {"precision": "fp32", "zero_stage": 3},
    "language_modeling-bf16-stage1": {"precision": "bf16", "zero_stage": 1},
    "sft-fp32-stage0": {"precision": "fp32", "zero_stage": 0, **CHATS},
    "dpo-fp32-stage0": {"precision": "fp32", "zero_stage": 0, **DPO},
    "dpo-fp32-stage3": {"precision": "fp32", "zero_stage": 3, **DPO},
}


def lines(name: str) -> list[str]:
    """The run's losses and gradient norms, a line for each step."""
    with tempfile.TemporaryDirectory() as folder:
        schedule = ("Cosine", {"warmup_ratio": 0.2})
        metrics = train(Path(folder) / "run", max_steps=12, optimizer=ADAM, schedule=schedule, **RUNS[name])
    return [f"{m['step']:>3} {m.get('loss', 0):.6g} {m.get('grad_norm', 0):.6g}" for m in metrics]


def main() -> None:
    """Write all files."""
    os.environ["BUMBLEBEE_CACHE"] = tempfile.mkdtemp()
    for name in RUNS:
        (HERE / f"{name}.txt").write_text("\n".join(lines(name)) + "\n")
        print(f"wrote {name}.txt")


if __name__ == "__main__":
    main()
