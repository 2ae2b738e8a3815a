"""Router losses in training: computed once, over the tokens of samples only, and divided by matching counts."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training_runs import Pairs, Rows, small_model, train

from bumblebee.datamodule import Batch
from bumblebee.nn import IGNORE_INDEX
from bumblebee.nn.router_losses import batch_balance_loss, sequence_balance_loss, z_loss
from bumblebee.tasks.dpo import DPO
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.tasks.reference import FrozenReference
from bumblebee.tasks.task import counted_tokens
from bumblebee.transforms import ActivationCheckpointing
from datamodules.collate import collate_rows

MOE: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0], "num_hidden_layers": 3,
    "router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1, "n_shared_experts": 1,
}  # fmt: skip


def rows(targets: tuple[int, ...] = (16, 1, 7, 0, 12, 16, 3, 5)) -> list[Batch]:
    """Batches of one row each."""
    data = Rows(len(targets), targets)
    data.setup(0)
    return [data.collate([sample]) for sample in data.train]


def joined(batches: list[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def gradient(task: Any, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of one optimizer step on these micro-batches, as computed by the trainer."""
    counts: dict[str, float] = {}
    for batch in batches:
        for name, count in task.all_counts(batch).items():
            counts[name] = counts.get(name, 0) + int(count)
    task.model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = task.total(task.all_losses(task.model, batch), counts)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}


def same(result: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert result[0] == pytest.approx(expected[0], rel=1e-5) and result[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(result[1][name], grad, rtol=1e-4, atol=2e-6, msg=lambda text, n=name: f"{n} {text}")


@pytest.mark.parametrize("balance", ["sequence", "batch"])
def test_loss_is_the_published_sum_over_layers(balance):
    model = small_model(**MOE, router_balance_loss=balance)
    batch = joined(rows())
    found = gradient(LanguageModeling(model), [batch])
    mlps, outputs = [model.model.layers[layer].mlp for layer in (1, 2)], []
    handles = [mlp.gate.register_forward_hook(lambda module, args, out: outputs.append(out)) for mlp in mlps]
    losses = model(**batch)
    for handle in handles:
        handle.remove()
    counted = (batch["labels"] != IGNORE_INDEX).any(1)[:, None].expand(-1, 16)
    loss = losses.sum() / (batch["labels"] != IGNORE_INDEX).sum()
    for routed in outputs:
        logits, experts = routed.logits.view(8, 16, 4), routed.experts.view(8, 16, 2)
        means = {
            "sequence": sequence_balance_loss(logits, experts, counted).sum() / 7,
            "batch": batch_balance_loss(logits, experts, counted),
        }
        loss = loss + 0.5 * means[balance] + 0.1 * z_loss(logits, counted).sum() / counted.sum()
    model.zero_grad()
    loss.backward()
    same(found, (loss.item(), {name: p.grad for name, p in model.named_parameters()}))


@pytest.mark.parametrize("kind", ["LanguageModeling", "DPO"])
def test_gradient_does_not_depend_on_micro_batches(kind):
    if kind == "DPO":
        data = Pairs(4, empty=[2])
        data.setup(0)
        task: Any = DPO(small_model(**MOE))
        task.reference_model = lambda model, batch, samples: torch.zeros(len(batch["index"]), 2)
        cut = [tail_padded(data.collate([pair])) for pair in data.train]
        width = max(batch["labels"].shape[1] for batch in cut)
        whole = joined([widened(batch, width) for batch in cut])
    else:
        task, cut = LanguageModeling(small_model(**MOE)), rows()
        whole = joined(cut)
    same(gradient(task, cut), gradient(task, [whole]))


def tail_padded(batch: Batch) -> Batch:
    """Positions after the last target become documents of their own, as datamodules pad."""
    targets = batch["labels"] != IGNORE_INDEX
    after_last = targets.flip(1).cumsum(1).flip(1) == 0
    return {**batch, "position_ids": batch["position_ids"].masked_fill(after_last & targets.any(1, keepdim=True), 0)}


def widened(batch: Batch, width: int) -> Batch:
    fill = {"input_ids": 0, "labels": IGNORE_INDEX, "position_ids": 0}
    missing = width - batch["labels"].shape[1]
    padded = {name: torch.nn.functional.pad(batch[name], (0, missing), value=value) for name, value in fill.items()}
    return {**batch, **padded}


def test_prompts_count_and_padding_does_not():
    ids = [5, 6, 7, 8]
    pieces = [[(ids, [IGNORE_INDEX, 7, 8, 9]), (ids[:1], [6])], [(ids[:2], [IGNORE_INDEX, 9])], [(ids, [IGNORE_INDEX] * 4)], []]
    counted = counted_tokens(collate_rows(pieces, 8, 0))
    assert counted.sum(1).tolist() == [5, 2, 0, 0]
    assert counted[0].tolist() == [True] * 5 + [False] * 3


def test_padding_does_not_change_the_gradient():
    model = small_model(**MOE)
    pieces = [[(list(range(1, 8)), list(range(2, 9)))], [([9, 8, 7], [8, 7, 6])]]
    narrow, wide = (collate_rows(pieces, width, 0) for width in (8, 24))
    same(gradient(LanguageModeling(model), [narrow]), gradient(LanguageModeling(model), [wide]))
    task = LanguageModeling(model)
    gradient(task, [wide])
    loads = task.auxiliary.logged[:, :4]
    assert loads.sum(1).tolist() == [2 * 10, 2 * 10], "no token is dropped, no padding is counted"


def test_recomputed_blocks_are_recorded_once():
    plain, saving = small_model(**MOE), small_model(**MOE)
    tasks = LanguageModeling(plain), LanguageModeling(saving, transforms=[ActivationCheckpointing()])
    found = [gradient(task, rows()) for task in tasks]
    assert found[0][0] == found[1][0]
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, rtol=0, atol=0)
    metrics = [task.metrics() for task in tasks]
    assert metrics[0] == metrics[1] and metrics[0]["router/load"] >= 1


def test_dpo_reference_does_not_add_router_losses():
    data = Pairs(3)
    data.setup(0)
    batch = data.collate(data.train)
    policy, other = small_model(0, **MOE), small_model(1, **MOE)
    found = []
    for reference in (policy, copy.deepcopy(other)):
        task = DPO(policy)
        task.reference_model = FrozenReference(reference)
        losses = task.all_losses(policy, batch)
        found.append({name: losses[name].item() for name in ("router/balance", "router/z")} | task.metrics())
    assert found[0] == found[1]


def test_a_model_without_routers_adds_nothing():
    task = LanguageModeling(small_model())
    assert task.auxiliary is None and task.metrics() == {}
    assert task.all_counts(rows()[0]).keys() == task.all_losses(task.model, rows()[0]).keys() == {"loss"}


def test_router_losses_are_logged_separately(tmp_path: Path):
    lines = train(tmp_path, model={**MOE, "router_bias_update_rate": 0.01}, max_steps=4)
    plain = train(tmp_path / "plain", model={**MOE, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}, max_steps=4)
    assert lines[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6), "the task's own"
    for line in lines:
        assert 1.0 <= line["router/load"] <= line["router/load_worst"] <= 2.0
        assert 0.9 * math.log(4) < line["router/entropy"] <= math.log(4) + 1e-6
        assert 0.9 < line["router/balance"] < 2.0 and 0.0 < line["router/z"]
    assert "router/balance" not in plain[0] and "router/load" in plain[0]
    assert lines[-1]["tokens"] == plain[-1]["tokens"]


def test_an_unused_expert_has_a_zero_gradient():
    """Its gradient exists and is zero, so that optimizer and gradient norm see the same parameters in every step."""
    model = small_model(**MOE)
    with torch.no_grad():
        for layer in (1, 2):
            model.model.layers[layer].mlp.gate.weight.zero_()  # ties: the first experts are taken
    _, grads = gradient(LanguageModeling(model), rows())
    assert any((grad == 0).flatten(1).all(1).any() for name, grad in grads.items() if "experts.gate_up_proj" in name)
