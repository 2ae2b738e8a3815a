"""GRPO's loss and gradient on fixed rollouts equal those of TRL's GRPOTrainer."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.training_runs import RewardedGRPO, small_model
from torch import Tensor, nn

from bumblebee.datamodule import Batch
from bumblebee.nn import IGNORE_INDEX

trl = pytest.importorskip("trl")

# (options of TRL, ours); the ratio of CISPO is limited to TRL's epsilon_high itself.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo"}, {}),
    "bnpo": ({"loss_type": "bnpo"}, {"normalise": "token"}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"normalise": "constant"}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"normalise": "token", "clip_high": 0.28}),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.3},
        {"normalise": "token", "surrogate": "cispo", "clip_high": 0.3},
    ),
    "sapo": ({"loss_type": "sapo"}, {"surrogate": "sapo"}),
    "gspo": ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, {"ratio": "sequence"}),
    "luspo": (
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"normalise": "sum", "ratio": "sequence"},
    ),
    "kl": ({"loss_type": "grpo", "beta": 0.3}, {"kl_beta": 0.3, "kl_correction": False}),
    "kl_corrected": (
        {"loss_type": "dapo", "beta": 0.3, "use_bias_correction_kl": True},
        {"normalise": "token", "kl_beta": 0.3},
    ),
    "gspo_kl_corrected": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.3, "use_bias_correction_kl": True},
        {"ratio": "sequence", "kl_beta": 0.3},
    ),
}


def fixed_batch(model: nn.Module) -> Batch:
    """Six completions of different lengths, with log-probabilities of a sampler, an old policy and a reference."""
    generator = torch.Generator().manual_seed(0)
    input_ids, labels = torch.randint(0, 320, (6, 9), generator=generator), torch.full((6, 9), IGNORE_INDEX)
    for row, (begin, length) in enumerate([(1, 3), (1, 6), (1, 1), (2, 5), (2, 2), (2, 4)]):
        labels[row, begin : begin + length] = torch.randint(0, 320, (length,), generator=generator)
    targets = labels != IGNORE_INDEX
    batch = {"input_ids": input_ids, "labels": labels, "position_ids": torch.arange(9).repeat(6, 1)}
    with torch.no_grad():
        exact = -model(input_ids, position_ids=batch["position_ids"], labels=labels)

    def noisy(values: Tensor, size: float) -> Tensor:
        return torch.where(targets, values + size * torch.randn(exact.shape, generator=generator), 0.0)

    old = noisy(exact, 0.4)
    return {
        **batch,
        "old_log_probs": old, "sampled_log_probs": noisy(old, 0.8), "reference_log_probs": noisy(exact, 0.5),
        "advantages": torch.tensor([0.8, -0.7, -0.1, 1.2, -1.4, 0.3]),
        "rewards": torch.zeros(6, 1), "reward": torch.zeros(6), "truncated": torch.zeros(6), "reward_std": torch.ones(2),
    }  # fmt: skip


def trainer_of(model: nn.Module, batch: Batch, options: dict[str, Any]) -> Any:
    """A GRPOTrainer with the attributes that its loss reads."""
    trainer = object.__new__(trl.GRPOTrainer)
    attributes: dict[str, Any] = {
        "model": model, "use_vllm": True, "vllm_importance_sampling_correction": True, "importance_sampling_level": "token",
        "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "max_completion_length": 7, "temperature": 1.0,
        "current_gradient_accumulation_steps": 1, "top_entropy_quantile": 1.0, "aux_loss_enabled": False,
        "off_policy_mask_threshold": None, "_entropy_bonus_enabled": False, "model_kwarg_keys": set(),
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        **options,
    }  # fmt: skip
    corrected = attributes.pop("use_bias_correction_kl", False)
    trainer.args = SimpleNamespace(
        delta=None,
        use_bias_correction_kl=corrected,
        steps_per_generation=1,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
    )
    trainer.accelerator = SimpleNamespace(
        num_processes=1, gather=lambda value: value, reduce=lambda value, reduction: value, unwrap_model=lambda model: model
    )
    for name, value in attributes.items():
        setattr(trainer, name, value)

    def log_probs_and_entropies(model: nn.Module, *args: object, **options: object) -> tuple[Tensor, Tensor, None]:
        logits = model(batch["input_ids"]).logits.log_softmax(-1)
        chosen = logits.gather(2, batch["labels"].clamp(min=0)[..., None])[..., 0]
        return torch.where(batch["labels"] != IGNORE_INDEX, chosen, 0.0), torch.zeros_like(chosen), None

    trainer._get_per_token_logps_and_entropies = log_probs_and_entropies
    return trainer


def loss_of_trl(trainer: Any, batch: Batch) -> Tensor:
    mask = (batch["labels"] != IGNORE_INDEX).int()
    weights = (batch["old_log_probs"] - batch["sampled_log_probs"]).exp().clamp(max=2.0)
    return trainer._compute_loss(trainer.model, {
        "prompt_ids": batch["input_ids"][:, :0], "prompt_mask": mask[:, :0], "completion_ids": batch["input_ids"],
        "completion_mask": mask, "advantages": batch["advantages"], "importance_sampling_ratio": weights,
        "num_items_in_batch": mask.sum(), "old_per_token_logps": batch["old_log_probs"],
        "ref_per_token_logps": batch["reference_log_probs"],
    })  # fmt: skip


def rows(batch: Batch, part: slice) -> Batch:
    groups = slice(part.start // 3, part.stop // 3)
    return {name: tensor[groups if name == "reward_std" else part] for name, tensor in batch.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, nn.Module, Batch]:
    from transformers import AutoModelForCausalLM

    folder: Path = tmp_path_factory.mktemp("model")
    ours = small_model(vocab_size=320)
    ours.save_pretrained(folder)
    return ours, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train(), fixed_batch(ours)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_gradient_and_metrics_equal_trl(variant, models):
    """With an old policy, a sampler and a reference that differ; ours in two micro-batches of different lengths."""
    ours, theirs, batch = models
    ours.zero_grad()
    theirs.zero_grad()
    trl_options, options = VARIANTS[variant]
    trainer = trainer_of(theirs, batch, trl_options)
    expected = loss_of_trl(trainer, batch)
    expected.backward()

    task = RewardedGRPO(ours, max_new_tokens=7, rollout_epochs=2, **options)
    parts = [rows(batch, slice(0, 3)), rows(batch, slice(3, 6))]
    counts: dict[str, float] = defaultdict(float)
    for part in parts:
        for name, count in task.counts(part).items():
            counts[name] += int(count)
    sums = [task.training_step(ours, part) for part in parts]
    total = torch.stack([task.total(each, counts) for each in sums]).sum()
    total.backward()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-6)

    means = {name: float(sum(each[name] for each in sums)) / counts[unit] for name, unit in task.units.items() if "rl/" in name}
    metrics = trainer._metrics["train"]
    names = {"kl": "rl/kl", "clip_ratio/low_mean": "rl/clipped_low", "clip_ratio/high_mean": "rl/clipped_high"}
    compared = [(means[names[name]], metrics[name][0]) for name in names if metrics.get(name)]
    assert all(one == pytest.approx(other, rel=1e-4) for one, other in compared)
    assert compared or variant in ("cispo", "sapo")


@pytest.mark.parametrize(
    ("estimator", "formula"),
    [
        ("k1", lambda x: -x),
        ("k2", lambda x: x**2 / 2),
        ("k3", lambda x: x.exp() - x - 1),
    ],
)
def test_kl_estimators_are_the_formulas(estimator, formula, models):
    ours, _, batch = models
    task = RewardedGRPO(ours, kl_beta=0.5, kl_estimator=estimator, kl_correction=False, normalise="sum")
    with torch.no_grad():
        log_probs = -ours(batch["input_ids"], position_ids=batch["position_ids"], labels=batch["labels"])
        sums = task.training_step(ours, batch)
        without = RewardedGRPO(ours, normalise="sum").training_step(ours, batch)
    targets = batch["labels"] != IGNORE_INDEX
    expected = formula(batch["reference_log_probs"] - log_probs)[targets].sum()
    torch.testing.assert_close(sums["rl/kl"].float(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums["grpo"] - without["grpo"], 0.5 * expected, rtol=1e-4, atol=1e-5)
