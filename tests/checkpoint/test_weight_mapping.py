"""Weight mapping rules are lossless in any order of tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.fake_shards import fake_shard
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bumblebee.checkpoint.parameter_loader import ParameterLoader
from bumblebee.checkpoint.weight_mapping import Rule, file_shape, slices_by_file_key, split_for, to_file_tensors

LAYERS = 2
RULES = [
    rule
    for layer in range(LAYERS)
    for rule in (
        Rule.rename(f"h.{layer}.ln", f"layers.{layer}.norm"),
        Rule.split(f"h.{layer}.qkv", [f"layers.{layer}.{name}" for name in "qkv"]),
        Rule.stack(
            [f"h.{layer}.experts.{expert}.{name}" for expert in range(3) for name in ("w1", "w3")], f"layers.{layer}.gate_up"
        ),
        Rule.stack([f"h.{layer}.experts.{expert}.bias" for expert in range(3)], f"layers.{layer}.bias"),
    )
]
SHAPES = {"norm": (4,), "q": (6, 4), "k": (2, 4), "v": (2, 4), "gate_up": (3, 10, 4), "bias": (3, 5), "same": (2, 2)}


class Model(nn.Module):
    """ParameterLoader with the shapes above, on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(LAYERS):
            layer = nn.Module()
            for name, shape in SHAPES.items():
                layer.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))
            self.layers.append(layer)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(old.shape, generator=generator) for key, old in Model().state_dict().items()}


def load(stored: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    model = Model()
    parameters = ParameterLoader(model, options.get("dtype"), torch.device("cpu"))
    slices = slices_by_file_key(RULES, parameters.shapes)
    assert slices.keys() == stored.keys()
    for key, tensor in stored.items():
        assert file_shape(slices[key]) == tuple(tensor.shape)
        for place, part in zip(slices[key], split_for(slices[key], tensor), strict=True):
            parameters.load(place, part)
    return model.state_dict()


@given(st.permutations(sorted(tensors())), st.data())
def test_round_trip_in_any_order(order, data):
    ours = tensors()
    stored = dict(to_file_tensors(RULES, ((key, ours[key]) for key in order)))
    assert stored["h.1.qkv"].shape == (10, 4) and stored["h.0.experts.2.w3"].shape == (5, 4)
    back = load({key: stored[key] for key in data.draw(st.permutations(sorted(stored)))})
    assert back.keys() == ours.keys()
    for key in ours:
        torch.testing.assert_close(back[key], ours[key], rtol=0, atol=0, msg=key)


def test_fused_parts_keep_the_order_of_the_rule():
    ours = tensors()
    stored = dict(to_file_tensors(RULES, ours.items()))
    layer = {name: ours[f"layers.0.{name}"] for name in SHAPES}
    torch.testing.assert_close(stored["h.0.qkv"], torch.cat([layer["q"], layer["k"], layer["v"]]))
    torch.testing.assert_close(stored["h.0.experts.1.w1"], layer["gate_up"][1, :5])
    torch.testing.assert_close(stored["h.0.experts.1.w3"], layer["gate_up"][1, 5:])
    torch.testing.assert_close(stored["h.0.experts.2.bias"], layer["bias"][2])
    assert stored["h.0.ln"] is layer["norm"] and "layers.0.same" in stored


def test_stacked_parts_are_cast_on_load():
    ours = tensors()
    back = load(dict(to_file_tensors(RULES, ours.items())), dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in back.values()} == {torch.bfloat16}
    torch.testing.assert_close(back["layers.0.gate_up"], ours["layers.0.gate_up"].bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_each_rank_loads_its_own_shard(monkeypatch, ranks):
    ours = tensors()
    stored = dict(to_file_tensors(RULES, ours.items()))
    shares: dict[str, list[Tensor]] = {key: [] for key in ours}
    for rank in range(ranks):
        monkeypatch.setattr("bumblebee.distributed.process_group.rank", lambda rank=rank: rank)
        model = Model()
        for key, parameter in model.named_parameters():
            shares[key].append(fake_shard(parameter, ranks))
        parameters = ParameterLoader(model, None, torch.device("cpu"))
        slices = slices_by_file_key(RULES, parameters.shapes)
        for key, tensor in stored.items():
            for place, part in zip(slices[key], split_for(slices[key], tensor), strict=True):
                parameters.load(place, part)
    for key, tensor in ours.items():
        torch.testing.assert_close(torch.cat(shares[key])[: tensor.numel()], tensor.flatten(), rtol=0, atol=0)


def test_rules_for_absent_parts_are_skipped():
    shapes = {"layers.0.q": (6, 4), "layers.0.k": (2, 4), "other": (1,)}
    assert slices_by_file_key(RULES, shapes).keys() == shapes.keys()
    ours = {key: torch.ones(shape) for key, shape in shapes.items()}
    assert dict(to_file_tensors(RULES, ours.items())).keys() == shapes.keys()
