"""Measure the overhead of the Trainer over a bare torch loop with the same model and batches, in one process.

    python benchmarks/loop_overhead.py [steps]

Model and batches of the quickstart's size. Takes about three minutes.

The two loops alternate step by step, from the same weights on the same batches, so that other load on the machine affects both.
Their final losses are compared. The Trainer has its usual callbacks for metrics, a log and a progress bar; the bare loop
collates, clips and updates as the Trainer does. The reported ratio is the median over all pairs of steps.
"""

from __future__ import annotations

import functools
import io
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from common import header, median, parser, table

BATCH, LENGTH, WARM_UP = 4, 256, 5


def make_model():
    import torch

    from bumblebee import Bumblebee, BumblebeeConfig

    torch.manual_seed(0)
    return Bumblebee(BumblebeeConfig.preset("tiny"))


def make_data(samples: int):
    import torch

    from bumblebee import DataModule

    class RandomTokens(DataModule):
        def setup(self, seed):
            self.train = torch.randint(4096, (samples, LENGTH + 1), generator=torch.Generator().manual_seed(0)).unbind()

        def collate(self, rows):
            ids = torch.stack(rows)
            positions = torch.arange(LENGTH).expand(len(rows), LENGTH).contiguous()
            return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "position_ids": positions}

    return RandomTokens()


def bare_loop(steps: int):
    """Iterate over the steps of a bare loop, yielding each loss."""
    import torch

    from bumblebee.optim import parameter_groups
    from bumblebee.training.loader import epoch_order

    model, data = make_model(), make_data(steps * BATCH)
    data.setup(0)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-3, fused=True)
    order = epoch_order(steps * BATCH, 42, 0)
    for step in range(steps):
        batch = data.collate([data.train[i] for i in order[step * BATCH : (step + 1) * BATCH]])
        loss = model(**batch).sum() / (BATCH * LENGTH)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def measure(steps: int) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """(bare, Trainer) seconds of each step, and the last loss of each."""
    import torch

    import callbacks
    from bumblebee import LanguageModeling, Trainer
    from bumblebee.callback import Callback

    bare = bare_loop(steps)

    class Alternate(Callback):
        """Run a step of the bare loop before each step of the Trainer."""

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

    alternate = Alternate()
    usual = {
        "progress": callbacks.ProgressBar(), "metrics": callbacks.MetricsHistory(), "log": callbacks.FileLog(),
        "checkpoint": callbacks.Checkpoint(every=10**9, save_last=False),
    }  # fmt: skip
    trainer = Trainer(max_steps=steps, micro_batch_size=BATCH, accumulate=1, precision="fp32", zero_stage=0)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3, fused=True)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        task = LanguageModeling(make_model())
        run = Path(folder) / "run"
        trainer.fit(task, make_data(steps * BATCH), optimizer, callbacks={**usual, "alternate": alternate}, output_dir=run)
    return alternate.times[WARM_UP:], (alternate.bare_loss, alternate.loss)


def main(steps: int) -> None:
    print(
        header(f"Trainer overhead over a bare torch loop, {steps} steps of {BATCH} x {LENGTH} tokens, 4.7 M parameters, fp32")
    )
    times, losses = measure(steps)
    assert abs(losses[0] - losses[1]) < 1e-4, f"the losses differ: {losses}"
    ratios = sorted(trainer / bare for bare, trainer in times)
    rows = [["bare torch", f"{1000 * median([bare for bare, _ in times]):.1f} ms", ""]]
    rows += [["Trainer", f"{1000 * median([trainer for _, trainer in times]):.1f} ms", f"{median(ratios):.3f}"]]
    print(f"Both loops end at a loss of {losses[0]:.4f}.\n")
    print(table(["loop", "step, median", "vs bare, median of pairs"], rows))
    low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
    print(f"\nInterquartile range of the {len(ratios)} ratios: {low:.3f} to {high:.3f}.")


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("steps", nargs="?", type=int, default=300)
    main(arguments.parse_args().steps)
