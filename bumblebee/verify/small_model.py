"""A small model with the options of a large one, whose weights are drawn so that each option shows in the logits.

Residual branches and embeddings are as small as the square root of the norms' epsilon: at the usual size the epsilon changes
the seventh digit, here the first. Every bias, norm and buffer is random too.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from bumblebee.config import FULL, SLIDING, BumblebeeConfig

LENGTH = 64  # tokens in a row
WINDOW = 10  # largest sliding window, so that it is shorter than documents
EXTENDED_AT = 24  # context length of dynamic RoPE scaling: longer than any packed document, shorter than a row

# Options of the model families; checked if no model is named.
FAMILY_CONFIGS = {
    "Qwen2": BumblebeeConfig(),
    "Llama 3.1": BumblebeeConfig(
        attention_bias=False, tie_word_embeddings=False, rope_theta=5e5, rms_norm_eps=1e-5,
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 64},
    ),
    "Qwen3 with windows": BumblebeeConfig(
        attention_bias=False, qk_norm=True, sliding_window=WINDOW, num_hidden_layers=2, layer_types=[FULL, SLIDING],
    ),
    "GLM-4": BumblebeeConfig(
        post_norms=True, rope_interleaved=True, partial_rotary_factor=0.5, rms_norm_eps=1.5625e-7, tie_word_embeddings=False,
    ),
    "Qwen2-MoE": BumblebeeConfig(
        num_experts=6, num_experts_per_tok=2, norm_topk_prob=False, n_shared_experts=2, shared_expert_gate=True,
        num_hidden_layers=2, decoder_sparse_step=2, router_aux_loss_coef=0.01, router_z_loss_coef=0.001,
    ),
    "layer norm and plain MLP": BumblebeeConfig(
        norm="layernorm", mlp_gated=False, mlp_bias=True, hidden_act="gelu", attention_output_bias=True, rms_norm_eps=1e-5,
    ),
}  # fmt: skip


def shrink(config: BumblebeeConfig) -> BumblebeeConfig:
    """Return a config with the same options and head width, and fewer layers, heads, experts and tokens.

    Every kind of layer (sparse or dense, windowed or full) remains.
    """
    kv_heads = min(config.num_key_value_heads, 2)
    group = config.num_attention_heads // config.num_key_value_heads
    heads = group * kv_heads
    unit = math.lcm(heads, 8)  # transformers requires a multiple of the heads, its experts one of 4
    layers = _num_layers(config)
    dynamic = (config.rope_scaling or {}).get("rope_type") == "dynamic"
    experts = min(config.num_experts or 0, max(8, 2 * config.num_experts_per_tok))
    return replace(
        config,
        vocab_size=min(config.vocab_size, 128), intermediate_size=96,
        hidden_size=unit * math.ceil(64 / unit),
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=EXTENDED_AT if dynamic else max(config.max_position_embeddings, LENGTH),
        sliding_window=config.sliding_window and min(config.sliding_window, WINDOW),
        layer_types=_layer_types(config, layers),
        num_experts=experts, moe_intermediate_size=96 if config.moe_intermediate_size == config.intermediate_size else 48,
        mlp_only_layers=[layer for layer in config.mlp_only_layers or [] if layer < layers],
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
        attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0,
        model_class=None,
    )  # fmt: skip


def _num_layers(config: BumblebeeConfig) -> int:
    """At least two, and enough for both sparse and dense layers if the model has both."""
    kinds = [config.is_sparse(layer) for layer in range(config.num_hidden_layers)]
    return min(len(kinds), max(2, 1 + max(kinds.index(kind) for kind in set(kinds))))


def _layer_types(config: BumblebeeConfig, layers: int) -> list[str] | None:
    if config.layer_types is None:
        return None
    types = config.layer_types[:layers]
    missing = [kind for kind in dict.fromkeys(config.layer_types) if kind not in types]
    return types[: layers - len(missing)] + missing


@torch.no_grad()
def draw_weights(model: nn.Module, config: BumblebeeConfig, seed: int) -> None:
    """Draw all parameters and buffers of a model, see the module docstring."""
    generator = torch.Generator().manual_seed(seed)
    small = min(1.0, math.sqrt(10 * config.rms_norm_eps)) or 0.02
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        mean, std = _distribution(name, tensor.shape, small, config.qk_norm)
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))


def _distribution(name: str, shape: torch.Size, small: float, qk_norm: bool) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values."""
    *_, module, kind = name.split(".")
    if module in ("post_self_attn_layernorm", "post_mlp_layernorm"):  # its output is added to the residual stream
        return (small if kind == "weight" else 0.0), 0.2 * small
    if "norm" in module:
        return (1.0 if kind == "weight" else 0.0), 0.2
    if module == "embed_tokens":
        return 0.0, small
    if kind == "e_score_correction_bias":
        return 0.0, 0.1
    writes_small = module in ("o_proj", "down_proj") or kind == "down_proj" or (qk_norm and module in ("q_proj", "k_proj"))
    return 0.0, (small if writes_small else 1.0) * (0.5 if kind == "bias" else 1.5 / math.sqrt(shape[-1]))
