"""Mixture-of-experts families: the fields of their config.json, and the keys of their experts.

The files hold a tensor for each expert; in the model, all experts of a layer are one tensor for each projection.
"""

from __future__ import annotations

from typing import Any

from bumblebee.checkpoint.weight_mapping import Rule
from bumblebee.config import BumblebeeConfig

Json = dict[str, Any]

# For training. Only the first is a field of Hugging Face, which keeps and ignores the others.
_ROUTERS: Json = {"router_aux_loss_coef": 0.001, "router_z_loss_coef": 0.0, "router_balance_loss": "sequence"}
_QWEN: Json = {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": None}


def read_mixtral(raw: Json) -> Json:
    """Mixtral: every layer is sparse, and ``intermediate_size`` is the width of an expert."""
    if raw.get("router_jitter_noise"):
        raise ValueError(f"config.json has router_jitter_noise {raw['router_jitter_noise']}, which is not supported")
    return {
        "attention_bias": False,
        "sliding_window": raw.get("sliding_window"),
        "num_experts": raw.get("num_local_experts", 8),
        **_read(raw, {"num_experts_per_tok": 2, **_ROUTERS}),
    }


def write_mixtral(config: BumblebeeConfig) -> Json:
    """The inverse of the function above."""
    return {"num_local_experts": config.num_experts, **_write(config, ("sliding_window", "num_experts_per_tok", *_ROUTERS))}


def mixtral_rules(config: BumblebeeConfig) -> list[Rule]:
    """``block_sparse_moe`` is the model's ``mlp``; w1 is the gate, w3 the up and w2 the down projection."""
    rules = _expert_rules(config, "block_sparse_moe", ("w1", "w3", "w2"))
    for layer in _sparse_layers(config):
        rules.append(Rule.rename(f"{layer}.block_sparse_moe.gate.weight", f"{layer}.mlp.gate.weight"))
    return rules


def read_qwen3_moe(raw: Json) -> Json:
    """Qwen3-MoE: a pattern decides which layers are sparse; a sliding window applies to every layer."""
    bias = bool(raw.get("attention_bias", False))
    return {
        "qk_norm": True,
        "attention_bias": bias,
        "attention_output_bias": bias,
        "sliding_window": raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None,
        "num_experts": raw.get("num_experts", raw.get("num_local_experts", 128)),
        **_read(raw, {"num_experts_per_tok": 8, "moe_intermediate_size": 768, **_QWEN, **_ROUTERS}),
    }


def write_qwen3_moe(config: BumblebeeConfig) -> Json:
    """The inverse of the function above."""
    names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "attention_bias", "sliding_window")
    return {"use_sliding_window": config.sliding_window is not None, **_write(config, (*names, *_QWEN, *_ROUTERS))}


def read_qwen2_moe(raw: Json) -> Json:
    """Qwen2-MoE: like Qwen3-MoE, with one wide shared expert, which is counted in units of ``moe_intermediate_size``."""
    if raw.get("use_sliding_window"):
        raise ValueError("config.json has use_sliding_window true, which is not supported in Qwen2MoeForCausalLM")
    width, shared = raw.get("moe_intermediate_size") or 1408, raw.get("shared_expert_intermediate_size", 5632)
    if shared % width:
        raise ValueError(
            f"config.json has shared_expert_intermediate_size {shared}; expected a multiple of moe_intermediate_size {width}"
        )
    return {
        "attention_bias": bool(raw.get("qkv_bias", True)),
        "num_experts": raw.get("num_experts", raw.get("num_local_experts", 60)),
        "n_shared_experts": shared // width,
        "shared_expert_gate": True,
        **_read(raw, {"num_experts_per_tok": 4, "moe_intermediate_size": 1408, **_QWEN, **_ROUTERS}),
    }


def write_qwen2_moe(config: BumblebeeConfig) -> Json:
    """The inverse of the function above."""
    return {
        "qkv_bias": config.attention_bias,
        "use_sliding_window": False,
        "shared_expert_intermediate_size": config.n_shared_experts * (config.moe_intermediate_size or 0),
        **_write(config, ("num_experts", "num_experts_per_tok", "moe_intermediate_size", *_QWEN, *_ROUTERS)),
    }


def qwen_moe_rules(config: BumblebeeConfig) -> list[Rule]:
    """The experts, and the shared expert of Qwen2-MoE, which has another name in the model."""
    rules = _expert_rules(config, "mlp", ("gate_proj", "up_proj", "down_proj"))
    for layer in _sparse_layers(config):
        for name in ("gate_proj", "up_proj", "down_proj"):
            rules.append(Rule.rename(f"{layer}.mlp.shared_expert.{name}.weight", f"{layer}.mlp.shared_experts.{name}.weight"))
    return rules


def expert_shapes(config: BumblebeeConfig) -> dict[str, tuple[int, int, int]]:
    """Shapes of the model's expert tensors by key: (experts, outputs, inputs)."""
    count, inner, width = config.num_experts or 0, config.moe_intermediate_size or 0, config.hidden_size
    shapes = {"gate_up_proj": (count, 2 * inner, width), "down_proj": (count, width, inner)}
    return {f"{layer}.mlp.experts.{name}": shape for layer in _sparse_layers(config) for name, shape in shapes.items()}


def _read(raw: Json, defaults: Json) -> Json:
    return {name: raw.get(name, default) for name, default in defaults.items()}


def _write(config: BumblebeeConfig, names: tuple[str, ...]) -> Json:
    return {name: getattr(config, name) for name in names}


def _sparse_layers(config: BumblebeeConfig) -> list[str]:
    return [f"model.layers.{layer}" for layer in range(config.num_hidden_layers) if config.is_sparse(layer)]


def _expert_rules(config: BumblebeeConfig, part: str, names: tuple[str, str, str]) -> list[Rule]:
    """Rules for the experts in ``part`` of each block; ``names`` are their gate, up and down projections in the file."""
    rules = []
    gate, up, down = names
    for layer in _sparse_layers(config):
        experts = [f"{layer}.{part}.experts.{index}" for index in range(config.num_experts or 0)]
        pairs = [f"{expert}.{name}.weight" for expert in experts for name in (gate, up)]
        rules.append(Rule.stack(pairs, f"{layer}.mlp.experts.gate_up_proj"))
        rules.append(Rule.stack([f"{expert}.{down}.weight" for expert in experts], f"{layer}.mlp.experts.down_proj"))
    return rules
