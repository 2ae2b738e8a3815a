"""config.json round trips for every family, and unsupported settings are refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bumblebee import BumblebeeConfig
from bumblebee.checkpoint.families import FAMILIES, OWN, family_of, read_config, write_config

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
LLAMA = {**QWEN2, "architectures": ["LlamaForCausalLM"]}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "truncate": False}
IDS = st.none() | st.integers(0, 99)
SHARES = st.sampled_from([0.0, 0.1])
CONFIGS = st.builds(
    BumblebeeConfig,
    vocab_size=st.integers(1, 1000),
    hidden_size=st.sampled_from([32, 48]),
    num_attention_heads=st.sampled_from([2, 4]),
    num_key_value_heads=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([None, 12, 16]),
    max_position_embeddings=st.integers(1, 10**6),
    rope_theta=st.floats(1.0, 1e7),
    rope_scaling=st.sampled_from([None, LLAMA3, YARN, {"rope_type": "dynamic", "factor": 2.0}]),
    partial_rotary_factor=st.sampled_from([1.0, 0.5]),
    rope_interleaved=st.booleans(),
    qk_norm=st.booleans(),
    num_hidden_layers=st.just(2),
    sliding_window=st.just(7),
    layer_types=st.none() | st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=2, max_size=2),
    hidden_act=st.sampled_from(["silu", "relu2"]),
    mlp_gated=st.booleans(),
    mlp_bias=st.booleans(),
    norm=st.sampled_from(["rmsnorm", "layernorm"]),
    post_norms=st.booleans(),
    attention_dropout=SHARES,
    residual_dropout=SHARES,
    embedding_dropout=SHARES,
    rms_norm_eps=st.floats(1e-9, 1e-3),
    tie_word_embeddings=st.booleans(),
    attention_bias=st.just(True),
    attention_output_bias=st.booleans(),
    initializer_range=st.floats(0, 1),
    bos_token_id=IDS,
    eos_token_id=IDS | st.lists(st.integers(0, 99), min_size=1),
    pad_token_id=IDS,
)


@settings(deadline=None)
@given(CONFIGS)
def test_a_config_comes_back_from_its_config_json(config):
    raw = json.loads(json.dumps(write_config(config, "float32")))
    assert read_config(raw) == config


GLM = {"rope_interleaved": True, "partial_rotary_factor": 0.5}
NEVER: dict[str, Any] = {"attention_bias": False}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({**NEVER, "qk_norm": True}, "Qwen3ForCausalLM"),
        ({**NEVER, "qk_norm": True, "sliding_window": 8}, "Qwen3ForCausalLM"),
        ({"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, "Qwen2ForCausalLM"),
        ({**NEVER, "sliding_window": 8}, "MistralForCausalLM"),
        ({**NEVER, "sliding_window": 8, "architecture": "LlamaForCausalLM"}, "MistralForCausalLM"),
        (NEVER, "LlamaForCausalLM"),
        ({**NEVER, "architecture": "MistralForCausalLM"}, "MistralForCausalLM"),
        ({**NEVER, "hidden_act": "gelu", "mlp_bias": True}, "LlamaForCausalLM"),
        (GLM, "GlmForCausalLM"),
        ({**GLM, **NEVER, "post_norms": True}, "Glm4ForCausalLM"),
        ({**GLM, "partial_rotary_factor": 1.0}, "GlmForCausalLM"),
        ({"attention_dropout": 0.1, "residual_dropout": 0.1}, "Qwen2ForCausalLM"),
        ({"post_norms": True}, OWN),
        ({"qk_norm": True, "post_norms": True}, OWN),
        ({"norm": "layernorm"}, OWN),
        ({"mlp_gated": False}, OWN),
        ({**NEVER, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, OWN),
        ({**GLM, "sliding_window": 8}, OWN),
    ],
    ids=str,
)
def test_config_selects_the_family_it_is_written_as(tiny, changes, name):
    config = tiny(**changes)
    raw = write_config(config, "float32")
    assert raw["architectures"] == [name]
    assert read_config(raw) == config or config.architecture == "LlamaForCausalLM"


def test_architecture_survives_round_trip():
    raw = {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": None}
    assert write_config(read_config(raw), "float32")["architectures"] == ["MistralForCausalLM"]


@pytest.mark.parametrize(
    ("bias", "output_bias", "name"),
    [(True, False, "Qwen2ForCausalLM"), (True, True, "LlamaForCausalLM"), (False, False, "LlamaForCausalLM")],
)
def test_the_architecture_follows_from_the_biases(tiny, bias, output_bias, name):
    config = tiny(attention_bias=bias, attention_output_bias=output_bias)
    assert family_of(config).architecture == name
    assert read_config(write_config(config, "float32")) == config


def test_weights_dtype_and_activation_are_written(tiny):
    raw = write_config(tiny(), "bfloat16")
    assert raw["torch_dtype"] == "bfloat16" and raw["hidden_act"] == "silu" and raw["model_type"] == "qwen2"


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {("type" if key == "rope_type" else key): LLAMA3[key] for key in LLAMA3}},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
    ],
    ids=["old", "old with the key type", "new"],
)
def test_rope_layouts_give_the_same_config(rope):
    config = read_config({**LLAMA, **rope})
    assert config.rope_theta == 5e5 and config.rope_scaling == LLAMA3


@pytest.mark.parametrize(
    "rope",
    [{}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}, {"rope_scaling": {"type": "default"}}],
    ids=str,
)
def test_absent_rope_settings_mean_no_scaling(rope):
    config = read_config({**LLAMA, **rope})
    assert config.rope_theta == 10_000.0 and config.rope_scaling is None


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({**QWEN2, "architectures": ["PhiForCausalLM"]}, "architectures ['PhiForCausalLM'] not supported: Bumblebee"),
        (
            {**QWEN2, "architectures": None},
            "architectures [] not supported: Bumblebee implements Qwen2ForCausalLM",
        ),
        ({**QWEN2, "hidden_act": "xielu"}, "hidden_act is 'xielu'; available: silu, gelu"),
        (
            {**QWEN2, "use_sliding_window": True, "layer_types": ["chunked", "full_attention"]},
            "layer_types has chunked; available",
        ),
        ({**QWEN2, "quantization_config": {"bits": 4}}, "quantization_config; quantized weights are not supported"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({**LLAMA, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            {**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mrope": 1}},
            "rope_type 'yarn' does not support mrope",
        ),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, "rope_type 'linear' requires factor"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a positive number, got 0"),
        ({**LLAMA, "rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_type 'longrope'; available:"),
        ({"architectures": ["LlamaForCausalLM"], "hidden_size": 8}, "has no vocab_size, intermediate_size, num_hidden_layers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_settings_are_named(raw, message):
    with pytest.raises(ValueError) as caught:
        read_config(raw)
    assert message in str(caught.value)


@pytest.mark.parametrize("left_out", [{}, {"num_key_value_heads": None}], ids=str)
def test_default_is_one_kv_head_per_query_head(left_out):
    raw = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert read_config({**raw, **left_out}).num_key_value_heads == 4


def test_every_family_is_found_by_its_architecture():
    assert {name: family.architecture for name, family in FAMILIES.items()} == {name: name for name in FAMILIES}


@pytest.mark.parametrize("harmless", [{"quantization_config": None}, {"use_sliding_window": False, "sliding_window": 4096}])
def test_settings_without_effect_are_accepted(harmless):
    assert read_config({**QWEN2, **harmless}) == read_config(QWEN2)
