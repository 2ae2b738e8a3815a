"""LoRA on the experts of a mixture of experts: one update per expert, PEFT-compatible folders, and merging."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training_runs import small_model, train
from safetensors.torch import load_file

os.environ["HF_HUB_OFFLINE"] = "1"

from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig  # noqa: E402

from bumblebee import Bumblebee  # noqa: E402
from bumblebee.checkpoint.consolidate import consolidate  # noqa: E402
from bumblebee.checkpoint.merge import merge  # noqa: E402
from bumblebee.lora import LoRA, attach  # noqa: E402

SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
PEERS = {
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=5),
    "qwen3 moe": Qwen3MoeConfig(**SHAPE, num_experts=5, moe_intermediate_size=24, norm_topk_prob=True),
}
MOE: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 24, "mlp_only_layers": [0], "n_shared_experts": 1}
IDS = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))
OPTIONS = {"rank": 4, "alpha": 8, "dropout": 0.0, "experts": True}


@pytest.fixture(scope="module", params=[*PEERS, "own"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with a tensor per expert, and one with a tensor for all experts of a layer."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    torch.manual_seed(0)
    if request.param == "own":
        small_model(**MOE, initializer_range=0.2).save_pretrained(folder)
    else:
        model = AutoModelForCausalLM.from_config(PEERS[request.param], dtype=torch.float32)
        for parameter in (p for p in model.parameters() if p.ndim > 1):
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An adapter folder with nonzero updates, and the logits of the model with them."""
    model, folder = Bumblebee.from_pretrained(base), tmp_path_factory.mktemp("adapter")
    before = model(IDS)
    LoRA(**OPTIONS, targets=["q_proj"])(model)
    torch.testing.assert_close(model(IDS), before)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    with torch.no_grad():
        logits = model(IDS)
    assert (logits - before).abs().max() > 0.5
    return folder, logits


def test_only_adapters_are_saved_one_per_expert(base, adapted):
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(adapted[0] / "adapter_model.safetensors").items()}
    config = Bumblebee.from_pretrained(base).config
    layer, count, inner = "base_model.model.model.layers.1.mlp.experts.", config.num_experts, config.moe_intermediate_size
    assert {key.removeprefix(layer): shape for key, shape in shapes.items() if key.startswith(layer)} == {
        "base_layer.lora_A.weight": (4 * count, 32), "base_layer.lora_B.weight": (2 * inner, 4 * count),
        "lora_A.weight": (4 * count, inner), "lora_B.weight": (32, 4 * count),
    }  # fmt: skip


def test_loaded_adapter_folder_is_merged(adapted):
    folder, logits = adapted
    torch.testing.assert_close(Bumblebee.from_pretrained(folder)(IDS), logits, rtol=1e-4, atol=1e-4)


def test_merged_and_attached_experts_agree(base, adapted, tmp_path):
    folder, logits = adapted
    merge(folder, tmp_path / "merged")
    torch.testing.assert_close(Bumblebee.from_pretrained(tmp_path / "merged")(IDS), logits, rtol=1e-4, atol=1e-4)
    beside = Bumblebee.from_pretrained(base)
    attach(beside, folder)
    torch.testing.assert_close(beside(IDS), logits, rtol=1e-5, atol=1e-5)


def test_peft_loads_expert_adapters(base, adapted):
    if "own" in base.name:
        pytest.skip("transformers does not know the architecture")
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        found = PeftModel.from_pretrained(reference, adapted[0]).eval()(IDS).logits
    torch.testing.assert_close(found, adapted[1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_expert_training_agrees_at_stages_1_and_3(tmp_path):
    small_model(**MOE).save_pretrained(tmp_path / "base")
    runs = [
        train(tmp_path / str(stage), base=str(tmp_path / "base"), lora=OPTIONS, max_steps=4, zero_stage=stage)
        for stage in (1, 3)
    ]
    for one, other in zip(*runs, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    tensors = load_file(tmp_path / "3" / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in tensors.values()) and any("experts.base_layer.lora_B" in key for key in tensors)


def test_checkpoint_consolidates_to_the_same_adapter(tmp_path):
    small_model(**MOE, router_bias_update_rate=0.01).save_pretrained(tmp_path / "base")
    each = {"checkpoint": ("Checkpoint", {"every": 2})}
    train(tmp_path / "run", base=str(tmp_path / "base"), lora=OPTIONS, max_steps=2, callbacks=each, zero_stage=1)
    consolidate(tmp_path / "run" / "checkpoint-2", tmp_path / "whole")
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "run"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_separate_experts_keep_separate_adapters(tmp_path, stage):
    config = MixtralConfig(**SHAPE, num_local_experts=5)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    each = {"checkpoint": ("Checkpoint", {"every": 2, "model": False})}
    train(tmp_path / "run", base=str(tmp_path / "base"), max_steps=2, callbacks=each, zero_stage=stage)
    consolidate(tmp_path / "run" / "checkpoint-2", tmp_path / "whole")
    before, after, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "run", "whole"))
    assert before.keys() == after.keys() == whole.keys() and "model.layers.1.block_sparse_moe.experts.4.w2.weight" in after
    assert all(torch.equal(whole[key], after[key]) for key in after)
    differences = {key: (after[key] - before[key]).abs().max() for key in after}
    assert all(0 < difference < 0.05 for difference in differences.values()), "two steps with a learning rate of 1e-2"


def test_dpo_reference_is_the_base_model(tmp_path):
    small_model(**MOE).save_pretrained(tmp_path / "base")
    lines = train(
        tmp_path / "run", base=str(tmp_path / "base"), lora=OPTIONS, task=("DPO", {}), data=("Pairs", {}), max_steps=3
    )
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and lines[-1]["loss"] != lines[0]["loss"]


def test_unsupported_expert_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="experts requires dropout 0 and dora false, got dropout 0.1 and dora false"):
        LoRA(experts=True)
    with pytest.raises(ValueError, match="got dropout 0 and dora true"):
        LoRA(experts=True, dropout=0.0, dora=True)
    small_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="experts: the model is not a mixture of experts"):
        LoRA(**OPTIONS)(Bumblebee.from_pretrained(tmp_path))
    model = small_model(**MOE)
    model.source = Path("base")
    with pytest.raises(ValueError, match="targets: 'experts' matches .*mlp.experts, which cannot have an adapter"):
        LoRA(targets=["experts"])(model)
