"""What does the loop cost over a bare torch loop: the same model, the same batches, one process?

    python benchmarks/loop_overhead.py [steps]     the quickstart's size; about three minutes

The two take turns step by step, from the same weights on the same batches, so that both meet the same neighbours on a shared
machine. Their losses are compared at the end. The loop has its usual callbacks
for metrics, a log and a progress line; the bare loop loads, clips and updates as the trainer does. What is quoted is the median
over all pairs of steps.
"""

from __future__ import annotations

import functools
import io
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from common import header, median, table

BATCH, LENGTH, WARM_UP = 4, 256, 5


def build():
    import torch

    from bumblebee import Bumblebee, BumblebeeConfig

    torch.manual_seed(0)
    return Bumblebee(BumblebeeConfig.preset("tiny"))


def data(samples: int):
    import torch

    from bumblebee import DataModule

    class Rows(DataModule):
        def setup(self, seed):
            self.train = torch.randint(4096, (samples, LENGTH + 1), generator=torch.Generator().manual_seed(0)).unbind()

        def collate(self, rows):
            ids = torch.stack(rows)
            positions = torch.arange(LENGTH).expand(len(rows), LENGTH).contiguous()
            return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "position_ids": positions}

    return Rows()


def bare_steps(steps: int):
    """A generator: each turn is one step of a bare loop, and gives its loss."""
    import torch

    from bumblebee.optim import parameter_groups
    from bumblebee.training.loader import epoch_order

    model, rows = build(), data(steps * BATCH)
    rows.setup(0)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-3, fused=True)
    order = epoch_order(steps * BATCH, 42, 0)
    for step in range(steps):
        batch = rows.collate([rows.train[i] for i in order[step * BATCH : (step + 1) * BATCH]])
        loss = model(**batch).sum() / (BATCH * LENGTH)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def pairs(steps: int) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """(bare, trainer) seconds of each step, and the last loss of each."""
    import torch

    import callbacks
    from bumblebee import LanguageModeling, Trainer
    from bumblebee.callback import Callback

    bare = bare_steps(steps)

    class Turns(Callback):
        """The bare loop's step before each of the trainer's."""

        times: list[tuple[float, float]] = []

        def on_step_start(self, trainer):
            before = time.perf_counter()
            if trainer.step:
                self.times.append((self.bare, before - self.started))
            self.bare_loss = next(bare)
            self.started = time.perf_counter()
            self.bare = self.started - before

        def on_log(self, trainer, metrics):
            self.loss = metrics["loss"]

    turns = Turns()
    others = {
        "progress": callbacks.ProgressBar(), "metrics": callbacks.MetricsHistory(), "log": callbacks.FileLog(),
        "checkpoint": callbacks.Checkpoint(every=10**9, save_last=False),
    }  # fmt: skip
    trainer = Trainer(max_steps=steps, micro_batch_size=BATCH, accumulate=1, precision="fp32", zero_stage=0)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3, fused=True)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        task = LanguageModeling(build())
        run = Path(folder) / "run"
        trainer.fit(task, data(steps * BATCH), optimizer, callbacks={**others, "turns": turns}, output_dir=run)
    return turns.times[WARM_UP:], (turns.bare_loss, turns.loss)


def main(steps: int) -> None:
    print(header(f"The loop against a bare torch loop, {steps} steps of {BATCH} x {LENGTH} tokens, 4.7 M parameters, fp32"))
    times, losses = pairs(steps)
    assert abs(losses[0] - losses[1]) < 1e-4, f"the losses differ: {losses}"
    ratios = sorted(trainer / bare for bare, trainer in times)
    rows = [["bare torch", f"{1000 * median([a for a, _ in times]):.1f} ms", ""]]
    rows += [["trainer", f"{1000 * median([b for _, b in times]):.1f} ms", f"{median(ratios):.3f}"]]
    print(f"both end at a loss of {losses[0]:.4f}\n")
    print(table(["loop", "a step, median", "of bare, median of pairs"], rows))
    low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
    print(f"\nhalf of the {len(ratios)} pairs lie between {low:.3f} and {high:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
