"""A transformers folder, trained and saved here, loads in transformers with the same logits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers.training_runs import LENGTH, VOCABULARY, train

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoModelForCausalLM, Glm4Config, MistralConfig, Qwen3Config  # noqa: E402

from bumblebee import Bumblebee  # noqa: E402
from bumblebee.checkpoint.consolidate import consolidate  # noqa: E402

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": None,
}  # fmt: skip
CONFIGS = {"glm4": Glm4Config(**SHAPE), "qwen3": Qwen3Config(**SHAPE), "mistral": MistralConfig(**SHAPE, sliding_window=4)}
IDS = torch.arange(LENGTH)[None]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_trained_folder_is_what_it_was_to_transformers(name: str, stage: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
    start.save_pretrained(tmp_path / "base")
    save = {"checkpoint": ("Checkpoint", {"every": 2, "keep": None})}
    train(tmp_path / "run", base=str(tmp_path / "base"), zero_stage=stage, max_steps=2, callbacks=save)
    consolidate(tmp_path / "run" / "checkpoint-2", tmp_path / "again")
    ours = Bumblebee.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        expected, before = ours(IDS), start(IDS).logits
        for folder in ("run", "again"):
            hf = AutoModelForCausalLM.from_pretrained(tmp_path / folder, attn_implementation="eager").eval()
            assert type(hf) is type(start)
            torch.testing.assert_close(hf(IDS).logits, expected, rtol=0, atol=2e-5)
    assert (expected - before).abs().max() > 0.05, "it was trained"
