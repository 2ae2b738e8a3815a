"""LoRA on layers that the family's files fuse: adapters convert exactly to and from PEFT on the transformers model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training_runs import train

os.environ["HF_HUB_OFFLINE"] = "1"

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, Glm4Config, Qwen2MoeConfig  # noqa: E402

from bumblebee import Bumblebee  # noqa: E402
from bumblebee.checkpoint.consolidate import consolidate  # noqa: E402
from bumblebee.checkpoint.merge import merge  # noqa: E402
from bumblebee.lora import LoRA, attach  # noqa: E402

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
PEERS = {"glm4": Glm4Config(**SHAPE, head_dim=8), "qwen2 moe": Qwen2MoeConfig(**SHAPE, **MIXTURE)}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pattern": {"targets": r".*layers\.1\..*(gate|up|q)_proj"},
    "list": {"targets": ["gate_proj", "up_proj"]},
}
IDS = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=PEERS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PEERS[request.param], dtype=torch.float32)
    widen(model)
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    model.save_pretrained(folder)
    return folder


def widen(model: torch.nn.Module) -> None:
    for parameter in (p for p in model.parameters() if p.requires_grad and p.ndim > 1):
        torch.nn.init.normal_(parameter, std=0.2)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out = model.eval()(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


def all_agree(base: Path, folder: Path, expected: torch.Tensor, output: Path) -> None:
    """Logits of PEFT on the transformers model, of the merged model, and of the model with the adapter attached."""
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    beside = Bumblebee.from_pretrained(base)
    before = logits(beside)
    attach(beside, folder)
    merge(folder, output)
    assert (expected - before).abs().max() > 0.5, "the updates have an effect"
    for found in (PeftModel.from_pretrained(reference, folder), Bumblebee.from_pretrained(folder), beside):
        torch.testing.assert_close(logits(found), expected, rtol=0, atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", OPTIONS)
def test_our_adapters_are_read_by_peft(base: Path, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Bumblebee.from_pretrained(base)
    LoRA(**{"rank": 4, "alpha": 6, "dropout": 0.0, **OPTIONS[kind]})(model)
    widen(model)
    model.save_pretrained(tmp_path / "adapter")
    all_agree(base, tmp_path / "adapter", logits(model), tmp_path / "merged")


@pytest.mark.parametrize("dora", [False, True])
def test_peft_adapters_of_fused_layers_load(dora: bool, tmp_path: Path) -> None:
    torch.manual_seed(2)
    reference = AutoModelForCausalLM.from_config(PEERS["glm4"], dtype=torch.float32, attn_implementation="eager")
    widen(reference)
    reference.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["gate_up_proj", "q_proj"], use_dora=dora, alpha_pattern={"gate_up_proj": 10},
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(reference, config)
    config.base_model_name_or_path = str(tmp_path / "base")  # by default the name on the hub
    widen(model)
    model.save_pretrained(tmp_path / "adapter")
    all_agree(tmp_path / "base", tmp_path / "adapter", logits(model), tmp_path / "merged")


def test_half_of_a_fused_layer_is_refused(base: Path) -> None:
    if "moe" in base.name:
        pytest.skip("nothing is fused there")
    with pytest.raises(ValueError, match=r"gate_proj, up_proj are one tensor in .*, .*mlp.gate_up_proj: target all"):
        LoRA(targets=["gate_proj"])(Bumblebee.from_pretrained(base))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_run_and_consolidation_write_the_same(base: Path, stage: int, tmp_path: Path) -> None:
    save = {"checkpoint": ("Checkpoint", {"every": 2, "keep": None})}
    job = {"base": str(base), "lora": {"rank": 4, "alpha": 8}, "zero_stage": stage, "max_steps": 2}
    train(tmp_path / "run", callbacks=save, **job)
    consolidate(tmp_path / "run" / "checkpoint-2", tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
