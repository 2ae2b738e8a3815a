"""Our models compute what transformers' of the same families compute: logits and gradients, over folders of either side.

Tiny random models, nothing is downloaded. All weights are drawn wide, norms and biases too, so that no part is without effect.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    Glm4Config,
    GlmConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from bumblebee import Bumblebee, BumblebeeConfig  # noqa: E402
from bumblebee.checkpoint.families import FAMILIES, family_of, read_config  # noqa: E402
from bumblebee.checkpoint.hf_folder import load_config  # noqa: E402
from bumblebee.checkpoint.weight_mapping import to_file_tensors  # noqa: E402
from bumblebee.hardware.flops import num_active_parameters  # noqa: E402

SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Of the four wavelengths of a head of width 8 this keeps one, interpolates one and stretches two.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 10_000.0,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 32}
GLM = {**SHAPE, "head_dim": 16, "pad_token_id": None}  # the row of a padding token has no gradient there
SPARSE = SHAPE | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
PEERS = {
    "qwen2 tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2 untied": Qwen2Config(**SHAPE, tie_word_embeddings=False, rms_norm_eps=1e-3),
    "qwen2 rope theta": Qwen2Config(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}),
    "llama": LlamaConfig(**SHAPE, attention_bias=False),
    "llama tied with bias": LlamaConfig(**SHAPE, attention_bias=True, tie_word_embeddings=True),
    "llama head_dim": LlamaConfig(**SHAPE, head_dim=12),
    "llama one kv head": LlamaConfig(**{**SHAPE, "num_key_value_heads": 1}),
    "llama llama3 rope": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=5, num_experts_per_tok=2),
    "mixtral window": MixtralConfig(**SHAPE, num_local_experts=3, num_experts_per_tok=2, sliding_window=50),
    "qwen3 moe": Qwen3MoeConfig(**SPARSE, norm_topk_prob=True, head_dim=12),
    "qwen3 moe every second layer": Qwen3MoeConfig(**SPARSE, decoder_sparse_step=2),
    "qwen3 moe dense first layer": Qwen3MoeConfig(**SPARSE, mlp_only_layers=[0], attention_bias=True),
    "qwen2 moe": Qwen2MoeConfig(**SPARSE, shared_expert_intermediate_size=48),
    "llama biases and gelu": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "qwen2 windows in the upper layers": Qwen2Config(**SHAPE, **WINDOW, max_window_layers=1),
    "qwen2 windows": Qwen2Config(**SHAPE, **WINDOW, max_window_layers=0),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "qwen3 tied with bias and windows": Qwen3Config(
        **SHAPE, head_dim=8, tie_word_embeddings=True, attention_bias=True, **WINDOW, max_window_layers=1
    ),
    "mistral": MistralConfig(**SHAPE, sliding_window=32),
    "mistral without a window": MistralConfig(**SHAPE, sliding_window=None, head_dim=16),
    "glm": GlmConfig(**GLM),
    "glm tied without bias": GlmConfig(**GLM, tie_word_embeddings=True, attention_bias=False),
    "glm4": Glm4Config(**GLM),
    "glm4 another part": Glm4Config(**GLM, partial_rotary_factor=0.25),
}
LENGTH = 200  # beyond the 128 positions of the original Llama 3 rope above
TOLERANCE = 2e-5  # in fp32; the largest difference seen is 8e-6, with logits of standard deviation 1


def widen(model: torch.nn.Module) -> None:
    """Weights with standard deviation 0.2, norms around one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)


def load_theirs(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def input_ids() -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=PEERS)
def folder(request, tmp_path_factory) -> Path:
    """A folder written by transformers."""
    model = AutoModelForCausalLM.from_config(PEERS[request.param], dtype=torch.float32)
    widen(model)
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hf(folder):
    return load_theirs(folder)


@pytest.fixture(scope="module")
def ours(folder):
    return Bumblebee.from_pretrained(folder)


@torch.no_grad()
def logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    out = model(input_ids)
    return (out if isinstance(out, torch.Tensor) else out.logits).float()


def test_logits_over_a_folder_of_transformers_are_theirs(ours, hf, input_ids):
    expected = logits(hf, input_ids)
    assert expected.std() > 1, "small logits would agree whatever we did"
    torch.testing.assert_close(logits(ours, input_ids), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"], ids=["one file", "shards"])
def test_transformers_computes_the_same_logits_over_our_folder(ours, hf, input_ids, tmp_path, shard_size):
    ours.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard_size == "5GB"
    loaded = load_theirs(tmp_path)
    assert type(loaded) is type(hf)
    torch.testing.assert_close(logits(loaded, input_ids), logits(hf, input_ids), rtol=0, atol=0)


def test_gradients_equal_transformers(ours, hf, input_ids):
    labels = torch.where(torch.arange(LENGTH) % 7 == 0, -100, input_ids.roll(-1, 1))
    ours.zero_grad()
    hf.zero_grad()
    ours(input_ids, labels=labels).sum().backward()
    torch.nn.functional.cross_entropy(hf(input_ids).logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    expected = dict(hf.named_parameters())
    actual = {name: parameter.grad for name, parameter in ours.named_parameters()}
    rules = family_of(ours.config).rules(ours.config)
    actual |= dict(to_file_tensors(rules, actual.items()))  # transformers names modules like ours or like the file
    for name in expected:
        gradient = actual[name]
        if name.endswith("k_proj.bias"):  # adds the same to all scores of a query: its true gradient is zero
            continue
        scale = expected[name].grad.abs().max()
        assert scale > 0.1, name
        torch.testing.assert_close(gradient / scale, expected[name].grad / scale, rtol=0, atol=1e-4, msg=name)


def test_bf16_logits_are_as_close_to_fp32_as_theirs(folder, hf, input_ids):
    exact, sparse = logits(hf, input_ids), load_config(folder).num_experts

    def error(model: torch.nn.Module) -> torch.Tensor:
        """Rounding may send a token to another expert, which changes all of its logits: there the middle token counts."""
        errors = (logits(model, input_ids) - exact).square().mean(-1)
        return (errors.median() if sparse else errors.mean()).sqrt()

    error_of_ours = error(Bumblebee.from_pretrained(folder, dtype=torch.bfloat16))
    assert 0 < error_of_ours < 1.2 * error(load_theirs(folder, torch.bfloat16))
    assert error_of_ours < 0.05 * exact.std()


def test_packed_documents_equal_transformers_on_each(ours, hf, input_ids):
    lengths = [50, 110, 40]
    position_ids = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    with torch.no_grad():
        packed = ours(input_ids, position_ids)
    alone = torch.cat([logits(hf, part) for part in input_ids.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=TOLERANCE)


def test_transformers_rejects_bumblebee_architecture(tiny, tmp_path):
    model = Bumblebee(tiny(norm="layernorm", mlp_gated=False, hidden_act="relu2", post_norms=True))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bumblebee"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    again = Bumblebee.from_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=0, atol=0)


OLD = {"rope_theta": LLAMA3["rope_theta"]}
SCALING = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
LAYOUTS = {
    "new": {"rope_parameters": LLAMA3},
    "old": {**OLD, "rope_scaling": SCALING},
    "old with the key type": {**OLD, "rope_scaling": {("type" if k == "rope_type" else k): SCALING[k] for k in SCALING}},
}


@pytest.fixture(scope="module")
def scaled(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A Llama with llama3 rope, and its config.json without any rope settings."""
    model = AutoModelForCausalLM.from_config(PEERS["llama llama3 rope"], dtype=torch.float32)
    widen(model)
    folder = tmp_path_factory.mktemp("rope")
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    assert raw.pop("rope_parameters")["rope_type"] == "llama3"
    return folder, {key: value for key, value in raw.items() if not key.startswith("rope")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_of_rope_settings_gives_transformers_logits(scaled, input_ids, layout):
    folder, bare = scaled
    (folder / "config.json").write_text(json.dumps(bare | LAYOUTS[layout]))
    scaled_logits = logits(Bumblebee.from_pretrained(folder), input_ids)
    torch.testing.assert_close(scaled_logits, logits(load_theirs(folder), input_ids), rtol=0, atol=TOLERANCE)
    (folder / "config.json").write_text(json.dumps(bare))
    assert (logits(Bumblebee.from_pretrained(folder), input_ids) - scaled_logits).abs().max() > 0.1, "scaling does something"


@pytest.mark.parametrize(
    ("architecture", "model_type"), [(family.architecture, family.model_type) for family in FAMILIES.values()][:-1]
)
def test_what_a_config_leaves_out_is_what_transformers_fills_in(tmp_path, architecture, model_type):
    # Sizes that fit every number of heads that is filled in.
    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": model_type, **sizes}))
    ours, hf = load_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    same = (*sizes, "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
            "initializer_range", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    assert {name: getattr(ours, name) for name in same} == {name: getattr(hf, name) for name in same}
    assert ours.rope_theta == hf.rope_parameters["rope_theta"]
    assert ours.head_dim == (getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)
    assert ours.partial_rotary_factor == hf.rope_parameters.get("partial_rotary_factor", 1.0)
    assert [ours.window_of(0)] * 2 == [getattr(hf, "sliding_window", None) or None, ours.window_of(1)]


def test_our_config_json_says_to_transformers_what_it_says_to_us(folder, ours, tmp_path):
    ours.save_pretrained(tmp_path)
    before, after = (AutoConfig.from_pretrained(path).to_dict() for path in (folder, tmp_path))
    for key in ("_name_or_path", "transformers_version", "head_dim", "torch_dtype"):
        before.pop(key, None)
        after.pop(key, None)
    assert before == {key: after[key] for key in before}


def test_moe_preset_equals_the_published_config():
    """Qwen3-30B-A3B, without weights."""
    published = Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        norm_topk_prob=True, max_position_embeddings=40960, rope_theta=1e6, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        hf, ours = AutoModelForCausalLM.from_config(published), Bumblebee(BumblebeeConfig.preset("30b-a3b"))
    assert ours.num_parameters() == sum(parameter.numel() for parameter in hf.parameters())
    assert num_active_parameters(ours) == pytest.approx(3.3e9, rel=0.02)
    read = read_config({**published.to_dict(), "architectures": ["Qwen3MoeForCausalLM"]})
    assert replace(read, architecture=None) == ours.config
