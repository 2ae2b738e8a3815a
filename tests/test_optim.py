"""Which parameters decay, and how the schedule's factor reaches the optimizer. The curves: ``test_schedules.py``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bumblebee.model import Bumblebee
from bumblebee.optim import GroupRule, Optimizer, parameter_groups, set_learning_rate


def decays(model: nn.Module, *rules: GroupRule) -> dict[str, float | None]:
    """For each parameter its group's weight decay; None stands for the optimizer's own."""
    groups = parameter_groups(model, rules)
    of = {id(parameter): group.get("weight_decay") for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(of)  # none is in two groups
    return {name: of[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_have_weight_decay(tiny, tied):
    model = Bumblebee(tiny(tie_word_embeddings=tied))
    kept = ("norm.weight", "bias", "embed_tokens.weight")
    for name, decay in decays(model).items():
        assert decay == (0.0 if name.endswith(kept) or "layernorm" in name else None), name


def test_only_an_untied_head_has_weight_decay(tiny):
    assert decays(Bumblebee(tiny(tie_word_embeddings=False)))["lm_head.weight"] is None
    tied = Bumblebee(tiny(tie_word_embeddings=True))
    [group] = [g for g in parameter_groups(tied) if any(p is tied.lm_head.weight for p in g["params"])]
    assert group["weight_decay"] == 0.0


def test_frozen_parameters_are_in_no_group(tiny):
    model = Bumblebee(tiny())
    model.model.layers[0].requires_grad_(False)
    frozen = {id(parameter) for parameter in model.model.layers[0].parameters()}
    assert not any(id(parameter) in frozen for group in parameter_groups(model) for parameter in group["params"])


def test_a_frozen_model_is_refused(tiny):
    with pytest.raises(ValueError, match="no trainable parameters"):
        parameter_groups(Bumblebee(tiny()).requires_grad_(False))


def test_there_is_no_empty_group():
    assert len(parameter_groups(nn.Linear(2, 2, bias=False))) == 1
    assert len(parameter_groups(nn.LayerNorm(2))) == 1


def test_the_first_matching_rule_applies(tiny):
    rules = (GroupRule("layers.0", weight_decay=0.3), GroupRule("mlp", lr=1.0, weight_decay=0.5), GroupRule("q_proj", lr=2.0))
    found = decays(Bumblebee(tiny()), *rules)
    assert found["model.layers.0.mlp.up_proj.weight"] == 0.3
    assert found["model.layers.1.mlp.up_proj.weight"] == 0.5
    assert found["model.layers.1.self_attn.q_proj.bias"] == 0.0
    assert found["model.layers.1.self_attn.q_proj.weight"] is None
    rates = {group.get("lr") for group in parameter_groups(Bumblebee(tiny()), rules)}
    assert rates == {None, 1.0, 2.0}


@pytest.mark.parametrize("pattern", ["no_such_layer", "*["])
def test_a_rule_that_cannot_match_is_refused(tiny, pattern):
    with pytest.raises(ValueError, match="trainer.groups") as caught:
        parameter_groups(Bumblebee(tiny()), [GroupRule(pattern)])
    assert pattern in str(caught.value)


def test_each_group_scales_its_own_learning_rate():
    groups = [{"lr": 0.1}, {"lr": 0.02}]
    for factor in (0.5, 0.25, 1.0):  # factors do not pile up
        assert set_learning_rate(groups, factor) == 0.1 * factor
        assert [group["lr"] for group in groups] == [0.1 * factor, 0.02 * factor]


def test_torch_optimizers_are_subclasses():
    assert issubclass(torch.optim.AdamW, Optimizer) and issubclass(torch.optim.SGD, Optimizer)
    assert not issubclass(nn.Linear, Optimizer)
