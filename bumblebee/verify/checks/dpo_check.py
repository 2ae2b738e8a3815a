"""DPO check: two steps of SGD in fp32 against the formula in plain PyTorch, and the reference's log-probabilities.

The model has dropout, which is switched off for the policy once the reference has been made: what the reference still drops is
a mistake. In the second step, policy and reference differ.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bumblebee.datamodule import Batch
from bumblebee.distributed import process_group
from bumblebee.nn import IGNORE_INDEX
from bumblebee.tasks.dpo import DPO
from bumblebee.trainer import Trainer
from bumblebee.verify import reference_loop
from bumblebee.verify.check_result import CheckResult, Measurement
from bumblebee.verify.checks.tolerances import movement_error
from bumblebee.verify.context import Context
from bumblebee.verify.training_run import (
    SEED,
    RandomTokens,
    RunRecorder,
    reference_model,
    run_training,
    to_device,
)

STEPS, ACCUMULATE, BETA, LEARNING_RATE = 2, 2, 0.3, 0.3
NUM_TARGETS = (20, 7, 1, 12)  # of chosen and rejected responses
DROPOUT = {"embedding_dropout": 0.1, "residual_dropout": 0.1}
BOUND = 1e-4  # typical: 1e-6


class RandomPairs(RandomTokens):
    """Pairs of random rows: sample i is the rows 2i (chosen) and 2i + 1 (rejected)."""

    def setup(self, seed: int) -> None:
        """Draw the rows, the same in every run."""
        super().setup(seed)
        self.train = range(self.samples // 2)

    def collate(self, samples: list[int]) -> Batch:
        """Return the pairs with these indices as a micro-batch."""
        return {
            **super().collate([row for pair in samples for row in (2 * pair, 2 * pair + 1)]),
            "index": torch.tensor(samples),
        }


@dataclass
class PairRecorder(RunRecorder):
    """Also records the reference's log-probabilities of the first pairs, and switches the policy's dropout off."""

    reference: Tensor | None = None  # (P, 2)

    def on_fit_start(self, trainer: Trainer) -> None:
        """Record weights and log-probabilities."""
        super().on_fit_start(trainer)
        assert isinstance(trainer.task, DPO) and trainer.task.reference_model is not None
        batch = trainer.to_device(trainer.data.collate([0, 1]))
        self.reference = trainer.task.reference_model(trainer.engine, batch, "train").cpu()
        for module in trainer.engine.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0


def run(context: Context) -> CheckResult:
    """Measure the reference's log-probabilities, the losses, and the weights relative to how far they should have moved."""
    pairs_per_step = 2 * ACCUMULATE * process_group.world_size()
    data = RandomPairs(2 * pairs_per_step * STEPS, NUM_TARGETS)
    trainer = context.build_trainer(STEPS, ACCUMULATE, gradient_clip=None, precision="fp32")
    recorder = PairRecorder()
    run_training(
        recorder, trainer, data, functools.partial(torch.optim.SGD, lr=LEARNING_RATE), context.folder / "dpo",
        context.fp32_attention, task=lambda model: DPO(model, pref_beta=BETA), model_options=DROPOUT,
    )  # fmt: skip
    policy, reference = (reference_model(recorder.initial_weights, context.device) for _ in range(2))
    with torch.no_grad():
        expected = log_probs(reference, to_device(data.collate([0, 1]), context.device)).cpu()
    losses = _train(policy, reference, data, pairs_per_step, context.device)
    weights = {name: tensor.detach().cpu() for name, tensor in policy.named_parameters()}
    assert recorder.reference is not None
    errors = {
        "reference log-probabilities": float(((recorder.reference - expected) / expected).abs().max()),
        "losses": max(abs(line["loss"] - loss) for line, loss in zip(recorder.metrics, losses, strict=True)),
        "weights": movement_error(recorder.initial_weights, recorder.final_weights, weights, list(weights)),
    }
    return CheckResult(tuple(Measurement(name, value, BOUND) for name, value in errors.items()))


def log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """Sum of the targets' log-probabilities of each response: (P, 2)."""
    labels = batch["labels"]
    logits = model(batch["input_ids"], batch["position_ids"]).log_softmax(-1)
    chosen = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels == IGNORE_INDEX, 0.0, chosen).sum(1).view(-1, 2)


def _train(
    policy: nn.Module, reference: nn.Module, data: RandomPairs, pairs_per_step: int, device: torch.device
) -> list[float]:
    """Train the policy; returns the mean loss of each step: -log sigmoid(beta h) (arXiv 2305.18290)."""
    optimizer, losses = torch.optim.SGD(policy.parameters(), lr=LEARNING_RATE), []
    for pairs in reference_loop.sample_indices(len(data.train), pairs_per_step, STEPS, SEED):
        batch = to_device(data.collate(pairs), device)
        with torch.no_grad():
            expected = log_probs(reference, batch)
        ratios = log_probs(policy, batch) - expected
        loss = torch.log1p(torch.exp(-BETA * (ratios[:, 0] - ratios[:, 1]))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
