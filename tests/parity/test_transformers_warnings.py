"""Every model folder that we write loads in transformers without a warning, large tokenizers included."""

from __future__ import annotations

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from bumblebee import Bumblebee, BumblebeeConfig, Tokenizer  # noqa: E402
from bumblebee.checkpoint.families import FAMILIES, OWN  # noqa: E402
from bumblebee.models.huggingface import HuggingFaceModel  # noqa: E402

LARGE = 100_001  # entries from which transformers looks for Mistral's old pattern
SMALL: dict[str, Any] = {"vocab_size": LARGE + 260, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.2}
GLM = {"rope_interleaved": True, "partial_rotary_factor": 0.5}
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"qk_norm": True, "attention_bias": False},
    "LlamaForCausalLM": {"attention_bias": False},
    "MistralForCausalLM": {"attention_bias": False, "sliding_window": 8},
    "GlmForCausalLM": GLM,
    "Glm4ForCausalLM": {**GLM, "post_norms": True},
    "MixtralForCausalLM": {"attention_bias": False, "num_experts": 4, "architecture": "MixtralForCausalLM"},
    "Qwen2MoeForCausalLM": {
        "num_experts": 4, "moe_intermediate_size": 32, "n_shared_experts": 1, "shared_expert_gate": True
    },
    "Qwen3MoeForCausalLM": {"preset": "tiny-moe"},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """As many entries as the large models have, made up."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id for id, token in enumerate([*alphabet, *(f"unused{index}" for index in range(LARGE))])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return Tokenizer(backend, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})


@pytest.fixture
def loaded(caplog):
    """A function that loads a folder in transformers, and requires silence."""
    transformers_logging.enable_propagation()

    def load(folder: Path) -> PreTrainedModel:
        caplog.clear()
        with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
            warnings.simplefilter("always")
            AutoTokenizer.from_pretrained(folder)("Bees fly.")
            model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert [record.getMessage() for record in caplog.records] == []
        assert [str(warning.message) for warning in caught if "transformers" in str(warning.message).lower()] == []
        assert not any(info.values()), info
        return model.eval()

    yield load
    transformers_logging.disable_propagation()


def test_each_family_is_tried():
    assert set(CONFIGS) == set(FAMILIES) - {OWN}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_written_folder_loads_silently_with_the_same_logits(architecture, tokenizer, loaded, tmp_path):
    changes = CONFIGS[architecture]
    torch.manual_seed(0)
    model = Bumblebee(BumblebeeConfig.preset(changes.get("preset", "tiny"), **SMALL, **_without_preset(changes))).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [architecture]
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tmp_path)(ids).logits, model(ids), rtol=0, atol=2e-5)


def test_folder_of_a_transformers_model_loads_silently(tokenizer, loaded, tmp_path):
    Bumblebee(BumblebeeConfig.preset("tiny", **SMALL)).save_pretrained(tmp_path / "old")
    raw = json.loads((tmp_path / "old" / "config.json").read_text())
    (tmp_path / "old" / "config.json").write_text(json.dumps({**raw, "transformers_version": None}))
    HuggingFaceModel.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "new")
    tokenizer.save_pretrained(tmp_path / "new")
    loaded(tmp_path / "new")


def _without_preset(changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if name != "preset"}
