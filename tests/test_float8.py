"""Float8: with torchao, which rounds to fp8 on the CPU, if it is installed, else with a stand-in of the same interface."""

from __future__ import annotations

import importlib.util
import logging
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers.training_runs import train
from safetensors.torch import load_file
from torch import nn

from bumblebee import Bumblebee, LanguageModeling
from bumblebee.lora import LoRA
from bumblebee.models.load_context import load_context
from bumblebee.transforms import Float8

IDS = torch.arange(66).reshape(2, 33) * 7 % 400


@dataclass
class StubConfig:
    pad_inner_dim: bool = False
    emulate: bool = False

    @classmethod
    def from_recipe_name(cls, name: str) -> StubConfig:
        return cls()


class StubLinear(nn.Linear):
    """Rounds input and weight to fp8; gradients pass the rounding."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.rounded(x), self.rounded(self.weight), self.bias)

    @staticmethod
    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = 448 / x.detach().abs().max()
        return x + ((x * scale).to(torch.float8_e4m3fn).to(x.dtype) / scale - x).detach()


def convert(model, config, module_filter_fn):
    assert config == StubConfig(pad_inner_dim=True, emulate=True)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module_filter_fn(module, name):
            module.__class__ = StubLinear


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("torchao") is None:
        package, float8 = ModuleType("torchao"), ModuleType("torchao.float8")
        package.__spec__ = SimpleNamespace()  # type: ignore[assignment]  # what find_spec returns for an imported module
        float8.Float8LinearConfig, float8.convert_to_float8_training = StubConfig, convert  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torchao", package)
        monkeypatch.setitem(sys.modules, "torchao.float8", float8)


def make(tiny, **changes) -> Bumblebee:
    torch.manual_seed(0)
    return Bumblebee(tiny(initializer_range=0.1, **changes))


def loss_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(IDS[:, :-1], labels=IDS[:, 1:]).mean()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_forward_and_gradients_are_within_fp8_of_plain(tiny, torchao, caplog):
    plain, model = make(tiny), make(tiny)
    parameters = dict(model.named_parameters())
    with caplog.at_level(logging.INFO):
        LanguageModeling(model, transforms=[Float8(emulate=True)])
    assert "14 layers in fp8; 0 skipped" in caplog.text
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.state_dict().keys() == plain.state_dict().keys()
    (loss, gradients), (expected, expected_gradients) = loss_and_gradients(model), loss_and_gradients(plain)
    assert 0 < abs(loss - expected) < 0.02
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() < 0.25 * gradient.norm() + 1e-6, name


def test_head_router_and_odd_sizes_stay(tiny, torchao, caplog):
    sparse = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "shared_expert_gate": True,
    }
    model = make(tiny, tie_word_embeddings=False, **sparse)
    with caplog.at_level(logging.INFO):
        Float8(emulate=True)(model)
    plain = {name for name, module in model.named_modules() if type(module) is nn.Linear or name == "lm_head"}
    assert {name.rpartition(".")[2] for name in plain} == {"lm_head", "shared_expert_gate", "gate_proj", "up_proj", "down_proj"}
    assert "6 skipped by size, such as model.layers.0.mlp.shared_experts.down_proj" in caplog.text
    assert type(model.lm_head).__name__ == "LMHead"


def test_state_loads_into_the_plain_model_and_back(tiny, torchao, tmp_path):
    model = make(tiny)
    Float8(emulate=True)(model)
    model.save_pretrained(tmp_path)
    plain = Bumblebee.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in plain.state_dict().items())
    model.load_state_dict(plain.state_dict())


@pytest.mark.slow
def test_training_resumes_to_the_same_weights(torchao, tmp_path):
    options = {"task": ("LanguageModeling", {"transforms": [Float8(emulate=True)]}), "zero_stage": 1, "precision": "bf16"}
    checkpoint = {"checkpoint": ("Checkpoint", {"every": 2})}
    train(tmp_path / "whole", callbacks=checkpoint, max_steps=4, **options)
    train(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2"), max_steps=4, **options)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())


@pytest.mark.parametrize("transform", [Float8(), Float8("rowwise")])
def test_needs_a_gpu_with_fp8(tiny, torchao, two_gpus, monkeypatch, transform):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(ValueError, match=r"compute capability 8.9 or above \(H100, L40S\), but this one has 8.0"):
        transform(make(tiny))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="but CUDA is not available"):
        transform(make(tiny))


def test_what_cannot_be_in_fp8_is_refused(tiny, monkeypatch, tmp_path, torchao):
    with pytest.raises(ValueError, match="scaling must be one of tensorwise, rowwise, rowwise_with_gw_hp, got 'block'"):
        Float8("block")
    with load_context(sharded=True), pytest.raises(ValueError, match="set trainer.zero_stage to 0, 1 or 2"):
        Float8(emulate=True)(make(tiny))
    with pytest.raises(ValueError, match="no trainable layer whose sizes are multiples of 16"):
        Float8(emulate=True)(make(tiny, hidden_size=24, head_dim=6, num_key_value_heads=4))
    make(tiny).save_pretrained(tmp_path)
    adapted = Bumblebee.from_pretrained(tmp_path)
    LoRA(rank=2, dropout=0.0)(adapted)
    with pytest.raises(ValueError, match="cannot be combined with LoRA"):
        Float8(emulate=True)(adapted)
    monkeypatch.setattr("bumblebee.models.float8_layers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"Float8 needs torchao: pip install bumblebee\[fp8\]"):
        Float8(emulate=True)(make(tiny))
