"""Measure the overhead of the Trainer over a bare torch loop with the same model and batches, in one process.

    python benchmarks/loop_overhead.py [steps]

Model and batches of the quickstart's size, in fp32 at ZeRO stage 0 and in bf16 at stage 1. Takes about six minutes.

The two loops alternate step by step, from the same weights on the same batches, so that other load on the machine affects both,
and the two configurations alternate round by round. Final losses are compared. The Trainer has its usual callbacks for metrics,
a log and a progress bar; the bare loop collates, clips and updates as the Trainer does. In bf16 it keeps fp32 weights and
gradients beside those of the model, as stage 1 does. The reported ratio is the median over all pairs of steps.
"""

from __future__ import annotations

import copy
import functools
import io
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from common import header, median, parser, table

BATCH, LENGTH, WARM_UP, ROUNDS = 4, 256, 5, 3
CONFIGURATIONS = (("fp32", 0), ("bf16", 1))  # precision and ZeRO stage


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


def bare_loop(steps: int, precision: str):
    """Iterate over the steps of a bare loop, yielding each loss."""
    import torch

    from bumblebee.optim import parameter_groups
    from bumblebee.training.loader import epoch_order

    model, data = make_model(), make_data(steps * BATCH)
    data.setup(0)
    masters = model
    if precision == "bf16":
        masters, model = model, copy.deepcopy(model).bfloat16()
    pairs = list(zip(masters.parameters(), model.parameters(), strict=True))
    optimizer = torch.optim.AdamW(parameter_groups(masters), lr=1e-3, fused=True)
    order = epoch_order(steps * BATCH, 42, 0)
    for step in range(steps):
        batch = data.collate([data.train[i] for i in order[step * BATCH : (step + 1) * BATCH]])
        loss = model(**batch).sum() / (BATCH * LENGTH)
        loss.backward()
        if masters is not model:
            for master, weight in pairs:
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if masters is not model:
            with torch.no_grad():
                for master, weight in pairs:
                    weight.copy_(master)
        yield loss.item()


def measure(steps: int, precision: str, stage: int) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """(bare, Trainer) seconds of each step, and the last loss of each."""
    import torch

    import callbacks
    from bumblebee import LanguageModeling, Trainer
    from bumblebee.callback import Callback

    bare = bare_loop(steps, precision)

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
    trainer = Trainer(max_steps=steps, micro_batch_size=BATCH, accumulate=1, precision=precision, zero_stage=stage)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3, fused=True)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        task = LanguageModeling(make_model())
        run = Path(folder) / "run"
        trainer.fit(task, make_data(steps * BATCH), optimizer, callbacks={**usual, "alternate": alternate}, output_dir=run)
    return alternate.times[WARM_UP:], (alternate.bare_loss, alternate.loss)


def main(steps: int) -> None:
    size = f"{ROUNDS} rounds of {steps} steps of {BATCH} x {LENGTH} tokens, 4.7 M parameters"
    print(header(f"Trainer overhead over a bare torch loop, {size}"))
    times: dict[tuple[str, int], list[tuple[float, float]]] = {configuration: [] for configuration in CONFIGURATIONS}
    for _ in range(ROUNDS):
        for precision, stage in CONFIGURATIONS:
            pairs, losses = measure(steps, precision, stage)
            tolerance = 1e-4 if precision == "fp32" else 0.1  # in bf16 the order of roundings differs
            assert abs(losses[0] - losses[1]) < tolerance, f"{precision}: the losses differ: {losses}"
            times[precision, stage] += pairs
    rows = []
    for (precision, stage), pairs in times.items():
        ratios = sorted(trainer / bare for bare, trainer in pairs)
        low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        bare, trainer = (1000 * median([pair[i] for pair in pairs]) for i in (0, 1))
        row = [f"{precision}, stage {stage}", f"{bare:.1f} ms", f"{trainer:.1f} ms"]
        rows.append([*row, f"{median(ratios):.3f}", f"{low:.3f} to {high:.3f}"])
    print(
        table(["configuration", "bare torch, median", "Trainer, median", "ratio, median of pairs", "interquartile range"], rows)
    )


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("steps", nargs="?", type=int, default=100)
    main(arguments.parse_args().steps)
