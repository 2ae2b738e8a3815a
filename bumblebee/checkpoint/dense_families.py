"""Families without experts: what only they have in their config.json, both ways, and the keys that differ from ours."""

from __future__ import annotations

from typing import Any

from bumblebee.checkpoint.weight_mapping import Rule
from bumblebee.config import FULL, SLIDING, BumblebeeConfig

Json = dict[str, Any]


def read_qwen2(raw: Json) -> Json:
    """Biases on queries, keys and values, always."""
    return {"attention_bias": True, **_read_qwen_windows(raw)}


def _read_qwen_windows(raw: Json) -> Json:
    """Either ``layer_types``, or all layers from ``max_window_layers`` on have the window."""
    if not raw.get("use_sliding_window") or raw.get("sliding_window", 4096) is None:
        return {}
    full, layers = raw.get("max_window_layers", 28), raw["num_hidden_layers"]
    types = raw.get("layer_types") or [SLIDING if layer >= full else FULL for layer in range(layers)]
    return {"sliding_window": raw.get("sliding_window", 4096), "layer_types": types}


def write_qwen_windows(config: BumblebeeConfig) -> Json:
    """Both ways of saying it: older readers know the first alone."""
    if config.sliding_window is None:
        return {"use_sliding_window": False}
    types = config.layer_types or [SLIDING] * config.num_hidden_layers
    window = {"sliding_window": config.sliding_window, "max_window_layers": types.index(SLIDING)}
    return {"use_sliding_window": True, **window, "layer_types": types}


def read_qwen3(raw: Json) -> Json:
    """Norms of query and key heads."""
    bias = bool(raw.get("attention_bias", False))
    return {"qk_norm": True, "attention_bias": bias, "attention_output_bias": bias, **_read_qwen_windows(raw)}


def read_llama(raw: Json) -> Json:
    """Biases everywhere in attention or nowhere, and perhaps in the feed-forward part."""
    bias = bool(raw.get("attention_bias", False))
    return {"attention_bias": bias, "attention_output_bias": bias, "mlp_bias": bool(raw.get("mlp_bias", False))}


def read_mistral(raw: Json) -> Json:
    """A sliding window in all layers, or null."""
    if len(set(raw.get("layer_types") or [])) > 1:
        raise ValueError("config.json has layer_types that differ; in MistralForCausalLM all layers are alike")
    return {"attention_bias": False, "sliding_window": raw.get("sliding_window", 4096)}


def read_glm(raw: Json) -> Json:
    """GLM-4 of 2024: rotary pairs are neighbours."""
    return {"rope_interleaved": True, "attention_bias": bool(raw.get("attention_bias", True))}


def read_glm4(raw: Json) -> Json:
    """GLM-4-0414: norms behind each part as well."""
    return {"post_norms": True, **read_glm(raw)}


def glm_rules(config: BumblebeeConfig) -> list[Rule]:
    """Gate and up are one matrix in the file."""
    layers = [f"model.layers.{layer}.mlp" for layer in range(config.num_hidden_layers)]
    return [Rule.split(f"{mlp}.gate_up_proj.weight", [f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"]) for mlp in layers]


GLM_DEFAULTS: Json = {
    "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-07,
    "pad_token_id": 151329, "eos_token_id": [151329, 151336, 151338],
}  # fmt: skip
