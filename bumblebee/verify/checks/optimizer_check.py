"""Optimizer check: a few steps of AdamW with known gradients against torch's AdamW on groups formed by name, in fp32.

The gradients are exact in every precision (``known_gradients``), and the optimizer works in fp32 at every stage. So weights and
both moments must agree to the rounding of fp32, in bf16 as well: a bound in which no wrong weight decay, eps, beta, bias
correction, learning rate or clipping can hide. All of these have unusual values, so that a default would be noticed; the sizes
of the gradients range from below eps to far above, the steps' norms from below the clipping threshold to above, and signs
differ from micro-batch to micro-batch.

The groups follow the documented rule: matrices are decayed; embeddings, norms and biases are not. One group has a learning rate
of its own. Adam forgets the scale of a gradient, so the moments are compared too: the first is linear in the clipped gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bumblebee.checkpoint.sharded_state import WEIGHTS
from bumblebee.distributed import process_group
from bumblebee.optim import Cosine, GroupRule
from bumblebee.verify import reference_loop
from bumblebee.verify.check_result import CheckResult, Measurement
from bumblebee.verify.checks.tolerances import movement_error, relative_error
from bumblebee.verify.context import Context
from bumblebee.verify.known_gradients import CoefficientRows, KnownGradients, averages_exactly
from bumblebee.verify.training_run import SEED, RunRecorder, run_training, saved_state

STEPS, ACCUMULATE, TARGETS, WARMUP = 6, 2, 16, 2
LEARNING_RATE, NORM_LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS = 0.02, 0.01, 0.5, (0.8, 0.95), 1e-3
CLIP = 2.6  # times the largest coefficient over the root of the rows: the norms of the steps are on both sides of it
LARGEST_SUM = 64  # of one row's coefficients on all ranks: those of a step's four then fit into 8 bits
EXACT_BOUND = 5e-5  # typical: 1e-6
GROUPS = ("matrices", "embeddings", "norms", "biases")
MOMENTS = {"first moments": "exp_avg", "second moments": "exp_avg_sq"}
Tensors = Mapping[str, Tensor]


def run(context: Context) -> CheckResult:
    """Measure the weights of each group, relative to how far they should have moved, and the moments of all."""
    rows_per_step = 2 * ACCUMULATE * process_group.world_size()
    largest = max(1, min(7, LARGEST_SUM // process_group.world_size()))
    clip = CLIP * largest / rows_per_step**0.5
    data = CoefficientRows(rows_per_step * STEPS, (TARGETS,), (-largest, largest))
    trainer = context.build_trainer(STEPS, ACCUMULATE, clip, groups=[GroupRule("norm", lr=NORM_LEARNING_RATE)])
    optimizer = functools.partial(
        torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS, eps=EPS
    )  # fmt: skip
    folder = context.folder / "optimizer"
    record = run_training(
        RunRecorder(save_at=STEPS), trainer, data, optimizer, folder, context.options.attention,
        Cosine(warmup_steps=WARMUP), KnownGradients,
    )  # fmt: skip
    checkpoint = folder / f"checkpoint-{STEPS}"
    weights = saved_state(checkpoint, WEIGHTS)
    initial = {name: record.initial_weights[name] for name in weights}
    expected = _reference(initial, data, rows_per_step, clip)
    members = {group: [name for name in weights if group_of(name) == group] for group in GROUPS}
    errors = {group: movement_error(initial, weights, expected[WEIGHTS], names) for group, names in members.items()}
    for label, kind in MOMENTS.items():
        moments = saved_state(checkpoint, kind)
        errors[label] = max(relative_error(moments[name], tensor.double()) for name, tensor in expected[kind].items())
    bound = EXACT_BOUND if averages_exactly(context) else torch.finfo(context.dtype).eps
    return CheckResult(tuple(Measurement(name, error, bound) for name, error in errors.items()))


def group_of(name: str) -> str:
    """The group of a parameter, from its name alone."""
    kinds = {"embed_tokens": "embeddings", "norm": "norms", "bias": "biases"}
    return next((group for part, group in kinds.items() if part in name), "matrices")


def _reference(initial: Tensors, data: CoefficientRows, rows_per_step: int, clip: float) -> dict[str, dict[str, Tensor]]:
    """Weights and moments of each parameter after the steps, by kind."""
    weights = {name: nn.Parameter(tensor.clone()) for name, tensor in initial.items()}
    groups = [
        {
            "params": [weight for name, weight in weights.items() if group_of(name) == group],
            "lr": NORM_LEARNING_RATE if group == "norms" else LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY if group == "matrices" else 0.0,
        }
        for group in GROUPS
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, foreach=False, fused=False)
    initial_rates = [group["lr"] for group in optimizer.param_groups]
    for step, rows in enumerate(reference_loop.sample_indices(data.samples, rows_per_step, STEPS, SEED)):
        for name, weight in weights.items():
            weight.grad = data.gradient(name, weight.shape, rows)
        nn.utils.clip_grad_norm_(weights.values(), clip)
        for group, rate in zip(optimizer.param_groups, initial_rates, strict=True):
            group["lr"] = rate * reference_loop.cosine_factor(step, WARMUP, STEPS)
        optimizer.step()
    return {
        WEIGHTS: {name: weight.detach() for name, weight in weights.items()},
        **{kind: {name: optimizer.state[weight][kind] for name, weight in weights.items()} for kind in MOMENTS.values()},
    }
