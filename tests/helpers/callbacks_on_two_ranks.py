"""Train on all ranks of a launcher with callbacks that communicate; started by ``test_callbacks_on_two_ranks.py``.

    torchrun --nproc_per_node 2 tests/helpers/callbacks_on_two_ranks.py FOLDER STAGE

Each rank writes its step, output and metrics to FOLDER/rank-<n>.json. Three more runs, to FOLDER/with, without and resumed, are
for the comparison of training with and without evaluations.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch

import callbacks
from bumblebee.callback import Callback
from bumblebee.distributed import process_group
from bumblebee.evaluation.tasks import MultipleChoice
from bumblebee.optim import Constant
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.tokenizer.tokenizer import Tokenizer
from bumblebee.trainer import Trainer
from helpers.training_runs import Recorder, Rows, small_model


class WorseningValidation(Callback):
    """Reports validations of which only the first is an improvement."""

    def on_step_end(self, trainer: Any) -> None:
        if trainer.step % 2 == 0:
            trainer.call("on_validation_end", {"validation_loss": float(trainer.step)})


def fit(folder: Path, stage: int, named: dict[str, Callback], steps: int, resume: str | None = None) -> Trainer:
    data = Rows(samples=64, targets=(16,))
    data.tokenizer = Tokenizer.train(["the bees of the hive"], 300)
    task = LanguageModeling(small_model(vocab_size=300))
    sizes: dict[str, Any] = {"max_steps": steps, "micro_batch_size": 2, "accumulate": 2}
    trainer = Trainer(**sizes, precision="fp32", zero_stage=stage, device="cpu", resume=resume)
    trainer.fit(task, data, partial(torch.optim.AdamW, lr=1e-2), Constant(), named, folder)
    return trainer


def fit_with_and_without_evaluations(folder: Path, stage: int, choices: Path) -> None:
    def evaluate() -> dict[str, Callback]:
        return {"evaluate": callbacks.Evaluate({"choices": MultipleChoice(str(choices))}, every=1)}

    fit(folder / "without", stage, {"checkpoint": callbacks.Checkpoint(every=2)}, 4)
    fit(folder / "with", stage, evaluate(), 4)
    fit(folder / "resumed", stage, evaluate(), 4, str(folder / "without" / "checkpoint-2"))


def main(folder: Path, stage: int) -> None:
    recorder = Recorder()
    choices = folder / f"choices-{process_group.rank()}.jsonl"
    records = [{"context": context, "choices": ["bees", "of the hive", "the"], "gold": 1} for context in ("the", "hive", "of")]
    choices.write_text("".join(json.dumps(record) + "\n" for record in records))
    named = {
        "recorder": recorder,
        "validation": WorseningValidation(),
        "stop": callbacks.EarlyStopping(patience=2),
        "checkpoint": callbacks.Checkpoint(every=None, keep=1, best=1, minutes=1e-9, save_last=False),
        "throughput": callbacks.Throughput(every=2, peak_tflops=1.0),
        "samples": callbacks.Samples(["the bee"], every=1, max_new_tokens=4 + process_group.rank(), temperature=0.0),
        "evaluate": callbacks.Evaluate({"choices": MultipleChoice(str(choices))}, every=2),
        "profiler": callbacks.Profiler(start=1, steps=1),
    }
    with redirect_stdout(io.StringIO()) as out:
        trainer = fit(folder / "run", stage, named, 20)
    result = {"step": trainer.step, "out": out.getvalue(), "metrics": recorder.metrics}
    (folder / f"rank-{process_group.rank()}.json").write_text(json.dumps(result))
    fit_with_and_without_evaluations(folder, stage, choices)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
