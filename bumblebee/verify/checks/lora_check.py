"""LoRA check: two steps of SGD in fp32 against plain PyTorch, which trains A and B of W + (alpha / rank) B A alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from bumblebee.distributed import process_group
from bumblebee.lora import LoRA
from bumblebee.model import Bumblebee
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.verify import reference_loop
from bumblebee.verify.check_result import CheckResult, Measurement
from bumblebee.verify.checks.tolerances import movement_error
from bumblebee.verify.context import Context
from bumblebee.verify.training_run import SEED, RandomTokens, RunRecorder, build_model, run_training, to_device

STEPS, ACCUMULATE, RANK, ALPHA, LEARNING_RATE = 2, 2, 4, 12, 5.0
BOUND = 1e-4  # typical: 1e-6
Tensors = Mapping[str, Tensor]


def run(context: Context) -> CheckResult:
    """Measure how far the adapters have moved, relative to how far they should have, and count changed base weights."""
    rows_per_step = 2 * ACCUMULATE * process_group.world_size()
    data = RandomTokens(rows_per_step * STEPS)
    trainer = context.build_trainer(STEPS, ACCUMULATE, gradient_clip=None, precision="fp32")

    def task(model: Bumblebee) -> LanguageModeling:
        model.source = context.folder / "base"  # named by the adapter folder; not read
        LoRA(rank=RANK, alpha=ALPHA, dropout=0.0)(model)
        return LanguageModeling(model)

    record = run_training(
        RunRecorder(), trainer, data, functools.partial(torch.optim.SGD, lr=LEARNING_RATE), context.folder / "lora",
        context.fp32_attention, task=task,
    )  # fmt: skip
    initial, final = record.initial_weights, record.final_weights
    expected = _reference(initial, data, rows_per_step, context.device)
    error = movement_error(initial, final, expected, list(expected))
    changed = sum(not torch.equal(final[name], tensor) for name, tensor in initial.items() if name not in expected)
    return CheckResult((Measurement("adapters", error, BOUND), Measurement("changed base tensors", changed, 0.0)))


def _reference(initial: Tensors, data: RandomTokens, rows_per_step: int, device: torch.device) -> dict[str, Tensor]:
    """A and B after the steps, by name."""
    model = build_model("naive").to(device)
    tensors = {name.replace(".base_layer", ""): tensor.to(device) for name, tensor in initial.items()}
    base = {name: tensors[name] for name, _ in model.named_parameters()}  # tied weights once
    adapters = {name: tensor.clone().to(device).requires_grad_() for name, tensor in initial.items() if ".lora_" in name}
    optimizer = torch.optim.SGD(adapters.values(), lr=LEARNING_RATE)
    for rows in reference_loop.sample_indices(data.samples, rows_per_step, STEPS, SEED):
        weights = {name: _merged(name, tensor, adapters) for name, tensor in base.items()}
        merged = functools.partial(_call, model, weights)
        loss = reference_loop.mean_loss(merged, to_device(data.collate(rows), device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: tensor.detach().cpu() for name, tensor in adapters.items()}


def _call(model: Bumblebee, weights: Tensors, *inputs: Tensor) -> Tensor:
    return torch.func.functional_call(model, dict(weights), inputs)


def _merged(name: str, weight: Tensor, adapters: Tensors) -> Tensor:
    """W + (alpha / rank) B A (arXiv 2106.09685)."""
    a, b = (adapters.get(name.replace("weight", f"lora_{letter}.default.weight")) for letter in "AB")
    return weight if a is None or b is None else weight + ALPHA / RANK * b @ a
