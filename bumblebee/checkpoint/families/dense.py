"""Dense families: the config.json fields specific to each, and the keys that differ from the model's."""

from __future__ import annotations

from typing import Any

from bumblebee.checkpoint.weight_mapping import Rule
from bumblebee.config import FULL, SLIDING, BumblebeeConfig

Json = dict[str, Any]


def read_qwen2(raw: Json) -> Json:
    """Qwen2: biases on the query, key and value projections."""
    return {"attention_bias": True, **_read_qwen_windows(raw)}


def _read_qwen_windows(raw: Json) -> Json:
    """Read ``layer_types``; without it, layers from ``max_window_layers`` on use the window."""
    if not raw.get("use_sliding_window") or raw.get("sliding_window", 4096) is None:
        return {}
    full, layers = raw.get("max_window_layers", 28), raw["num_hidden_layers"]
    types = raw.get("layer_types") or [SLIDING if layer >= full else FULL for layer in range(layers)]
    return {"sliding_window": raw.get("sliding_window", 4096), "layer_types": types}


def write_qwen_windows(config: BumblebeeConfig) -> Json:
    """Write both ``max_window_layers`` and ``layer_types``: older versions of transformers read only the former."""
    if config.sliding_window is None:
        return {"use_sliding_window": False}
    types = config.layer_types or [SLIDING] * config.num_hidden_layers
    window = {"sliding_window": config.sliding_window, "max_window_layers": types.index(SLIDING)}
    return {"use_sliding_window": True, **window, "layer_types": types}


def read_qwen3(raw: Json) -> Json:
    """Qwen3: query and key heads are normalized."""
    bias = bool(raw.get("attention_bias", False))
    return {"qk_norm": True, "attention_bias": bias, "attention_output_bias": bias, **_read_qwen_windows(raw)}


def read_llama(raw: Json) -> Json:
    """Llama: biases on all four attention projections or none, and optionally in the MLP."""
    bias = bool(raw.get("attention_bias", False))
    return {"attention_bias": bias, "attention_output_bias": bias, "mlp_bias": bool(raw.get("mlp_bias", False))}


def read_mistral(raw: Json) -> Json:
    """Mistral: a sliding window in every layer, or none."""
    if len(set(raw.get("layer_types") or [])) > 1:
        raise ValueError("config.json has different layer_types, but all layers of MistralForCausalLM are the same")
    return {"attention_bias": False, "sliding_window": raw.get("sliding_window", 4096)}


def read_glm(raw: Json) -> Json:
    """GLM-4 (2024): rotates adjacent pairs (x[2i], x[2i+1])."""
    return {"rope_interleaved": True, "attention_bias": bool(raw.get("attention_bias", True))}


def read_glm4(raw: Json) -> Json:
    """GLM-4-0414: a norm after attention and MLP as well."""
    return {"post_norms": True, **read_glm(raw)}


def glm_rules(config: BumblebeeConfig) -> list[Rule]:
    """Gate and up projections are one matrix in the file."""
    layers = [f"model.layers.{layer}.mlp" for layer in range(config.num_hidden_layers)]
    return [Rule.split(f"{mlp}.gate_up_proj.weight", [f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"]) for mlp in layers]


GLM_DEFAULTS: Json = {
    "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-07,
    "pad_token_id": 151329, "eos_token_id": [151329, 151336, 151338],
}  # fmt: skip
