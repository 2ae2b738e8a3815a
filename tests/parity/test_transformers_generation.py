"""Greedy generation from a model folder gives the same tokens as transformers' ``generate`` and stops with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    GenerationConfig,
    Glm4Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
)

from bumblebee import Generator, SamplingParams, Tokenizer  # noqa: E402

PROMPTS = ["The bee", "In the garden there are many flowers", "🐝"]
LENGTH = 16


@pytest.fixture(scope="module")
def hf() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, bos_token_id=None, eos_token_id=399,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.from_pretrained(tokenizer_folder)


def save(model: Qwen2ForCausalLM, tokenizer: Tokenizer, folder: Path, eos: int | list[int]) -> Path:
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def hf_generate(model: Qwen2ForCausalLM, ids: list[int]) -> list[int]:
    out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=LENGTH)
    return out[0, len(ids) :].tolist()


def test_greedy_tokens_match_transformers(hf, tokenizer, tmp_path):
    """Our Generator also stops at the tokenizer's EOS token, so transformers gets it too."""
    generator = Generator.from_pretrained(save(hf, tokenizer, tmp_path, [399, tokenizer.eos_token_id]), device="cpu")
    outs = generator.generate(PROMPTS, SamplingParams(max_new_tokens=LENGTH, temperature=0.0))
    assert [out.token_ids for out in outs] == [hf_generate(hf, tokenizer.encode(prompt)) for prompt in PROMPTS]
    assert LENGTH in [len(out.token_ids) for out in outs]


def test_every_eos_id_of_generation_config_stops(hf, tokenizer, tmp_path):
    ids = tokenizer.encode(PROMPTS[0])
    save(hf, tokenizer, tmp_path / "free", 399)
    free = hf_generate(hf, ids)
    for index in (3, 6):
        save(hf, tokenizer, tmp_path / "list", [398, free[index]])
        stopped = hf_generate(hf, ids)
        assert len(stopped) < LENGTH and stopped[-1] == free[index]
        generator = Generator.from_pretrained(tmp_path / "list", device="cpu")
        (out,) = generator.generate([PROMPTS[0]], SamplingParams(max_new_tokens=LENGTH, temperature=0.0))
        assert out.token_ids == stopped and out.finish_reason == "stop"


SHAPE = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": None,
    "eos_token_id": 399, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "mistral": MistralConfig(**SHAPE, sliding_window=5),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "glm4": Glm4Config(**SHAPE, head_dim=16),
    "yarn": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
    "dynamic": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_generates_the_same_tokens(name, tokenizer, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[name], dtype=torch.float32).eval()
    generator = Generator.from_pretrained(save(model, tokenizer, tmp_path, [399, tokenizer.eos_token_id]), device="cpu")
    outs = generator.generate(PROMPTS, SamplingParams(max_new_tokens=LENGTH, temperature=0.0))
    assert [out.token_ids for out in outs] == [hf_generate(model, tokenizer.encode(prompt)) for prompt in PROMPTS]
    assert max(len(out.token_ids) for out in outs) == LENGTH


def test_generation_ends_before_dynamic_rope_changes(tokenizer, tmp_path):
    """Cached keys were rotated with the frequencies of the model's own context length."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES["dynamic"], dtype=torch.float32).eval()
    generator = Generator.from_pretrained(save(model, tokenizer, tmp_path, [399]), device="cpu")
    params = SamplingParams(max_new_tokens=1000, temperature=0.0, ignore_eos=True)
    ids = tokenizer.encode(PROMPTS[0])
    (out,) = generator.generate([PROMPTS[0]], params)
    assert len(ids) + len(out.token_ids) == 64 and out.finish_reason == "length"
    with torch.no_grad():
        logits = generator.model(torch.tensor([ids + out.token_ids]))[0]
    assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == out.token_ids
