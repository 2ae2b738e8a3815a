"""How Hugging Face's mixtures of experts are read and written: the fields of their config.json, and their experts' keys.

In the files experts lie one by one; in a model all experts of a layer are one tensor for each projection.
"""

from __future__ import annotations

from typing import Any

from bumblebee.checkpoint.weight_mapping import Rule
from bumblebee.config import BumblebeeConfig

Json = dict[str, Any]

# For training: the first is Hugging Face's own, of the others it knows nothing and keeps them.
_ROUTERS: Json = {"router_aux_loss_coef": 0.001, "router_z_loss_coef": 0.0, "router_balance_loss": "sequence"}
_QWEN: Json = {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": None}


def read_mixtral(raw: Json) -> Json:
    """Every layer is sparse, the experts are as wide as the config says of a dense layer."""
    if raw.get("router_jitter_noise"):
        raise ValueError(f"config.json has router_jitter_noise {raw['router_jitter_noise']}, which is not supported")
    return {
        "attention_bias": False,
        "sliding_window": raw.get("sliding_window"),
        "num_experts": raw.get("num_local_experts", 8),
        **_read(raw, {"num_experts_per_tok": 2, **_ROUTERS}),
    }


def write_mixtral(config: BumblebeeConfig) -> Json:
    """The same fields back."""
    return {"num_local_experts": config.num_experts, **_write(config, ("sliding_window", "num_experts_per_tok", *_ROUTERS))}


def mixtral_rules(config: BumblebeeConfig) -> list[Rule]:
    """``block_sparse_moe`` is our ``mlp``; w1 is the gate, w3 up, w2 down."""
    rules = _expert_rules(config, "block_sparse_moe", ("w1", "w3", "w2"))
    for layer in _sparse_layers(config):
        rules.append(Rule.rename(f"{layer}.block_sparse_moe.gate.weight", f"{layer}.mlp.gate.weight"))
    return rules


def read_qwen3_moe(raw: Json) -> Json:
    """Which layers are sparse is a pattern; the sliding window, if any, is for all layers."""
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
    """The same fields back."""
    names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "attention_bias", "sliding_window")
    return {"use_sliding_window": config.sliding_window is not None, **_write(config, (*names, *_QWEN, *_ROUTERS))}


def read_qwen2_moe(raw: Json) -> Json:
    """As Qwen3-MoE, with one shared expert, which we count in experts."""
    if raw.get("use_sliding_window"):
        raise ValueError("config.json has use_sliding_window true, which is not supported in Qwen2MoeForCausalLM")
    width, shared = raw.get("moe_intermediate_size") or 1408, raw.get("shared_expert_intermediate_size", 5632)
    if shared % width:
        raise ValueError(
            f"config.json has shared_expert_intermediate_size {shared}, which is no multiple of moe_intermediate_size {width}"
        )
    return {
        "attention_bias": bool(raw.get("qkv_bias", True)),
        "num_experts": raw.get("num_experts", raw.get("num_local_experts", 60)),
        "n_shared_experts": shared // width,
        "shared_expert_gate": True,
        **_read(raw, {"num_experts_per_tok": 4, "moe_intermediate_size": 1408, **_QWEN, **_ROUTERS}),
    }


def write_qwen2_moe(config: BumblebeeConfig) -> Json:
    """The same fields back."""
    return {
        "qkv_bias": config.attention_bias,
        "use_sliding_window": False,
        "shared_expert_intermediate_size": config.n_shared_experts * (config.moe_intermediate_size or 0),
        **_write(config, ("num_experts", "num_experts_per_tok", "moe_intermediate_size", *_QWEN, *_ROUTERS)),
    }


def qwen_moe_rules(config: BumblebeeConfig) -> list[Rule]:
    """Only the shared expert, of Qwen2-MoE, has another name, beside the experts."""
    rules = _expert_rules(config, "mlp", ("gate_proj", "up_proj", "down_proj"))
    for layer in _sparse_layers(config):
        for name in ("gate_proj", "up_proj", "down_proj"):
            rules.append(Rule.rename(f"{layer}.mlp.shared_expert.{name}.weight", f"{layer}.mlp.shared_experts.{name}.weight"))
    return rules


def expert_shapes(config: BumblebeeConfig) -> dict[str, tuple[int, int, int]]:
    """Our tensors that hold all experts of a layer, by their keys: (experts, outputs, inputs)."""
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
    """``part`` of a block has the experts, ``names`` are those of their gate, up and down projections."""
    rules = []
    gate, up, down = names
    for layer in _sparse_layers(config):
        theirs = [f"{layer}.{part}.experts.{expert}" for expert in range(config.num_experts or 0)]
        pairs = [f"{expert}.{name}.weight" for expert in theirs for name in (gate, up)]
        rules.append(Rule.stack(pairs, f"{layer}.mlp.experts.gate_up_proj"))
        rules.append(Rule.stack([f"{expert}.{down}.weight" for expert in theirs], f"{layer}.mlp.experts.down_proj"))
    return rules
