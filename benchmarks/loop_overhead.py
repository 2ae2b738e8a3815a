"""What does the loop cost over a bare torch loop: the same model, the same batches, one process?

    python benchmarks/loop_overhead.py [steps]     the quickstart's size; about three minutes

The two take turns, and each turn begins with the same weights. Their losses are compared first. The loop has its usual
callbacks for metrics, a log and a progress line; the bare loop clips, schedules and updates as the trainer does.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from pathlib import Path

from common import header, median, table

BATCH, LENGTH, ROUNDS = 4, 256, 5


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


def with_trainer(steps: int) -> tuple[float, float]:
    """Seconds a step, and the last loss."""
    import torch

    import callbacks
    from bumblebee import LanguageModeling, Trainer
    from bumblebee.callback import Callback

    class Clock(Callback):
        def on_step_end(self, trainer):
            if trainer.step == 3:
                self.started = time.perf_counter()
            elif trainer.step == steps:
                self.seconds = (time.perf_counter() - self.started) / (steps - 3)

        def on_log(self, trainer, metrics):
            self.loss = metrics["loss"]

    clock = Clock()
    others = {
        "metrics": callbacks.MetricsHistory(),
        "log": callbacks.FileLog(),
        "progress": callbacks.ProgressBar(interval=1e9),
    }
    trainer = Trainer(max_steps=steps, micro_batch_size=BATCH, accumulate=1, precision="fp32", zero_stage=0)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3, fused=True)
    with tempfile.TemporaryDirectory() as folder:
        task = LanguageModeling(build())
        trainer.fit(task, data(steps * BATCH), optimizer, callbacks={**others, "clock": clock}, output_dir=Path(folder) / "run")
    return clock.seconds, clock.loss


def bare(steps: int) -> tuple[float, float]:
    """Seconds a step, and the last loss."""
    import torch

    from bumblebee.loader import epoch_order
    from bumblebee.optim import parameter_groups

    model, rows = build(), data(steps * BATCH)
    rows.setup(0)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-3, fused=True)
    order = epoch_order(steps * BATCH, 42, 0)
    for step in range(steps):
        if step == 3:
            started = time.perf_counter()
        batch = rows.collate([rows.train[i] for i in order[step * BATCH : (step + 1) * BATCH]])
        loss = model(**batch).sum() / (BATCH * LENGTH)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        last = loss.item()
    return (time.perf_counter() - started) / (steps - 3), last


def main(steps: int) -> None:
    print(header(f"The loop against a bare torch loop, {steps} steps of {BATCH} x {LENGTH} tokens, 4.7 M parameters, fp32"))
    with_trainer(4)  # imports and first allocations
    pairs = [(bare(steps), with_trainer(steps)) for _ in range(ROUNDS)]
    assert all(abs(a[1] - b[1]) < 1e-4 for a, b in pairs), f"the losses differ: {pairs}"
    ratios = [b[0] / a[0] for a, b in pairs]
    rows = [["bare torch", f"{1000 * median([a[0] for a, _ in pairs]):.1f} ms", ""]]
    rows += [["trainer", f"{1000 * median([b[0] for _, b in pairs]):.1f} ms", f"{median(ratios):.3f}"]]
    print(f"both end at a loss of {pairs[0][0][1]:.4f}\n")
    print(table(["loop", "a step, median of 5 turns", "of bare, median of pairs"], rows))
    print(f"\npairs: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
