"""Loss curve check: six steps of AdamW at the user's stage and precision against plain PyTorch in fp32.

Four measurements: losses, relative to the fall from the first to the last loss; gradient norms, relative to themselves; and the
fp32 weights of the checkpoint, relative to how far they should have moved, for all weights and for the norm layers alone. The
last one detects an optimizer without fp32 weights: near 1 bf16 has a spacing of 2^-7, so that norm weights in bf16 never move
at this learning rate, which six losses hardly show.

Bounds: fp32 deviates by about 1e-5 at most. bf16 deviates by up to 0.8 % (losses), 0.4 % (norms) and 2 % (weights) over all
stages and several seeds; without fp32 weights by 8 % (weights) and 100 % (norm weights).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch

from bumblebee.checkpoint.sharded_state import ShardReader
from bumblebee.datamodule import Batch
from bumblebee.distributed import process_group
from bumblebee.optim import Cosine
from bumblebee.verify import reference_loop
from bumblebee.verify.check_result import CheckResult, Measurement
from bumblebee.verify.checks.tolerances import movement_error
from bumblebee.verify.context import Context
from bumblebee.verify.training_run import SEED, RandomTokens, RunRecorder, reference_model, run_training, to_device

STEPS, ACCUMULATE, LEARNING_RATE, WEIGHT_DECAY, CLIP, WARMUP = 6, 3, 1e-3, 0.1, 0.5, 1
FP32_BOUNDS = {"losses": 1e-4, "gradient norms": 1e-4, "weights": 1e-4, "norm weights": 1e-4}
HALF_BOUNDS = {"losses": 0.03, "gradient norms": 0.02, "weights": 0.05, "norm weights": 0.05}


def run(context: Context) -> CheckResult:
    """Train, repeat the run in plain PyTorch and measure the differences."""
    rows_per_step = 2 * ACCUMULATE * process_group.world_size()
    data = RandomTokens(rows_per_step * 7 // 2)  # the last step of an epoch is half a step
    trainer = context.build_trainer(STEPS, ACCUMULATE, CLIP)
    optimizer = functools.partial(torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule, folder = Cosine(warmup_steps=WARMUP), context.folder / "loss-curve"
    record = run_training(
        RunRecorder(save_at=STEPS), trainer, data, optimizer, folder, context.options.attention, schedule
    )  # fmt: skip
    with ShardReader(folder / f"checkpoint-{STEPS}" / "training_state") as shards:
        weights = {name: shards.parameter(name) for name in shards.shapes}
    skipped = skipped_steps(record.metrics)
    model = reference_model(record.initial_weights, context.device)
    curve = reference_loop.train_adamw(
        model, _batches(data, rows_per_step, context.device), LEARNING_RATE, WEIGHT_DECAY, CLIP,
        lambda step: reference_loop.cosine_factor(step, WARMUP, STEPS), skipped,
    )  # fmt: skip
    expected = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    bounds = FP32_BOUNDS if context.options.precision == "fp32" else HALF_BOUNDS
    fall = curve[0].loss - curve[-1].loss
    steps = list(zip(record.metrics, curve, strict=True))
    errors = {
        "losses": _worst(abs(line["loss"] - reference.loss) / fall for line, reference in steps),
        "gradient norms": _worst(
            abs(line["grad_norm"] / reference.grad_norm - 1)
            for step, (line, reference) in enumerate(steps)
            if step not in skipped
        ),
        "weights": movement_error(record.initial_weights, weights, expected, list(expected)),
        "norm weights": movement_error(record.initial_weights, weights, expected, [n for n in expected if "norm" in n]),
    }
    return CheckResult(tuple(Measurement(name, error, bounds[name]) for name, error in errors.items()))


def _batches(data: RandomTokens, rows_per_step: int, device: torch.device) -> list[Batch]:
    """The rows of each step as one batch."""
    indices = reference_loop.sample_indices(len(data.train), rows_per_step, STEPS, SEED)
    return [to_device(data.collate(rows), device) for rows in indices]


def skipped_steps(metrics: list[dict[str, float]]) -> set[int]:
    """Steps that fp16 training skipped while it searched for its loss scale."""
    totals = [0.0, *(line.get("skipped_steps", 0.0) for line in metrics)]
    return {step for step in range(len(metrics)) if totals[step + 1] > totals[step]}


def _worst(values: Iterable[float]) -> float:
    """The largest value; NaN counts as infinite."""
    return max((math.inf if math.isnan(value) else value for value in values), default=0.0)
