"""The chosen stage and precision against plain torch in fp32: six steps of AdamW with a schedule and clipping.

Four measures. Losses, as shares of the fall from the first step to the last; gradient norms, as shares of themselves; how far
the fp32 weights of the checkpoint are from where they should have moved, as a share of that move, for all weights and for the
norms' alone. The last one is there for bf16: numbers near 1 have a spacing of 2^-7 there, so that an optimizer that has no fp32
weights never moves them at this rate, while the loss hardly shows it in six steps.

Bounds: fp32 is off by about 1e-5 at most. bf16 was by up to 0.8 % of the fall, 0.4 % of the norms and 2 % of the
moves, on all stages and several seeds; without fp32 weights, the moves were off by 8 %, and those of the norms by 100 %.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from bumblebee.checkpoint.sharded_state import PieceReader
from bumblebee.distributed import process_group
from bumblebee.optim import Cosine
from bumblebee.verify import reference_loop
from bumblebee.verify.check_result import Measure
from bumblebee.verify.context import Setting
from bumblebee.verify.training_run import Record, Rows, train

STEPS, ACCUMULATE, RATE, DECAY, CLIP, WARMUP = 6, 3, 1e-3, 0.1, 0.5, 1
FP32 = {"losses": 1e-4, "gradient norms": 1e-4, "weights": 1e-4, "norm weights": 1e-4}
HALF = {"losses": 0.03, "gradient norms": 0.02, "weights": 0.05, "norm weights": 0.05}


def measures(setting: Setting) -> list[Measure]:
    """How far the trial is from plain torch."""
    rows_a_step = 2 * ACCUMULATE * process_group.world_size()
    rows = Rows(rows_a_step * 7 // 2)  # the epoch's last step is half a step
    trainer = setting.trainer(setting.options.precision, CLIP, ACCUMULATE, STEPS)
    optimizer = functools.partial(torch.optim.AdamW, lr=RATE, weight_decay=DECAY)
    schedule, folder = Cosine(warmup_steps=WARMUP), setting.folder / "curve"
    record = train(Record(save_at=STEPS), trainer, rows, optimizer, folder, setting.options.attention, schedule)
    with PieceReader(folder / f"checkpoint-{STEPS}" / "training_state") as pieces:
        after = {name: pieces.whole(name) for name in pieces.shapes}
    skipped = _skipped(record.metrics)
    points, wanted = reference_loop.adamw(
        rows, record.before, setting.device, rows_a_step, STEPS, RATE, DECAY, CLIP, WARMUP, skipped
    )  # fmt: skip
    bounds = FP32 if setting.options.precision == "fp32" else HALF
    fall = points[0][0] - points[-1][0]
    losses = (abs(line["loss"] - loss) / fall for line, (loss, _) in zip(record.metrics, points, strict=True))
    norms = (
        abs(line["grad_norm"] / norm - 1)
        for step, (line, (_, norm)) in enumerate(zip(record.metrics, points, strict=True))
        if step not in skipped
    )
    values = {
        "losses": worst(losses),
        "gradient norms": worst(norms),
        "weights": _off_course(record.before, after, wanted, list(wanted)),
        "norm weights": _off_course(record.before, after, wanted, [name for name in wanted if "norm" in name]),
    }
    return [Measure(name, value, bounds[name]) for name, value in values.items()]


def worst(values: Iterable[float]) -> float:
    """The largest; a value that is no number is larger than any."""
    return max((math.inf if math.isnan(value) else value for value in values), default=0.0)


def _skipped(metrics: list[dict[str, float]]) -> set[int]:
    """Steps that fp16 left out while it looked for its loss scale."""
    totals = [0.0, *(line.get("skipped_steps", 0.0) for line in metrics)]
    return {step for step in range(len(metrics)) if totals[step + 1] > totals[step]}


def _off_course(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], wanted: Mapping[str, Tensor], names: list[str]
) -> float:
    off, moved = (
        math.sqrt(sum(float((one[name].double() - other[name]).square().sum()) for name in names))
        for one, other in ((after, wanted), (wanted, before))
    )
    return off / moved
