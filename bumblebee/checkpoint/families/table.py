"""The table of families: one Hugging Face architecture a row.

Families are looked up by ``architectures`` in config.json. A setting that a family allows but Bumblebee does not compute is
rejected by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from bumblebee.checkpoint.families import dense, moe
from bumblebee.checkpoint.weight_mapping import Rule
from bumblebee.config import BumblebeeConfig

Json = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture.

    Args:
        architecture: its class name in config.json.
        model_type: ``model_type`` in config.json.
        read: converts config.json to the BumblebeeConfig fields that are specific to the family.
        write: the inverse of ``read``.
        defaults: values that Hugging Face assumes for absent fields, where they differ from other families'.
        partial_rotary_factor: value if config.json has none; None if the family always rotates complete heads.
        rules: how the files' tensors map to the model's, for a config; see ``bumblebee/checkpoint/weight_mapping.py``.
        unused_keys: suffixes of keys in the files that are ignored.
    """

    architecture: str
    model_type: str
    read: Callable[[Json], Json]
    write: Callable[[BumblebeeConfig], Json]
    defaults: Json
    partial_rotary_factor: float | None = None
    rules: Callable[[BumblebeeConfig], list[Rule]] = lambda config: []
    unused_keys: tuple[str, ...] = ("rotary_emb.inv_freq",)


OWN = "BumblebeeForCausalLM"  # not an architecture of transformers


def _read_own(raw: Json) -> Json:
    return {field.name: raw[field.name] for field in fields(BumblebeeConfig) if field.name in raw}


def _write_own(config: BumblebeeConfig) -> Json:
    return config.to_dict() | {"architecture": None}


FAMILIES = {
    family.architecture: family
    for family in (
        Family(
            "Qwen2ForCausalLM",
            "qwen2",
            dense.read_qwen2,
            dense.write_qwen_windows,
            defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
        ),
        Family(
            "LlamaForCausalLM",
            "llama",
            dense.read_llama,
            lambda c: {"attention_bias": c.attention_bias, "mlp_bias": c.mlp_bias},
            defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        ),
        Family(
            "Qwen3ForCausalLM",
            "qwen3",
            dense.read_qwen3,
            lambda c: {"attention_bias": c.attention_bias, **dense.write_qwen_windows(c)},
            defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
        ),
        Family(
            "MistralForCausalLM",
            "mistral",
            dense.read_mistral,
            lambda c: {"sliding_window": c.sliding_window},
            defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "bos_token_id": 1, "eos_token_id": 2},
        ),
        Family(
            "GlmForCausalLM",
            "glm",
            dense.read_glm,
            lambda c: {"attention_bias": c.attention_bias},
            defaults=dense.GLM_DEFAULTS,
            partial_rotary_factor=0.5,
            rules=dense.glm_rules,
        ),
        Family(
            "Glm4ForCausalLM",
            "glm4",
            dense.read_glm4,
            lambda c: {"attention_bias": c.attention_bias},
            defaults=dense.GLM_DEFAULTS,
            partial_rotary_factor=0.5,
            rules=dense.glm_rules,
        ),
        Family(
            "MixtralForCausalLM",
            "mixtral",
            moe.read_mixtral,
            moe.write_mixtral,
            defaults={
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            rules=moe.mixtral_rules,
        ),
        Family(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            moe.read_qwen3_moe,
            moe.write_qwen3_moe,
            defaults={"num_key_value_heads": 4, "max_position_embeddings": 32768},
            rules=moe.qwen_moe_rules,
        ),
        Family(
            "Qwen2MoeForCausalLM",
            "qwen2_moe",
            moe.read_qwen2_moe,
            moe.write_qwen2_moe,
            defaults={"num_key_value_heads": 16, "max_position_embeddings": 32768},
            rules=moe.qwen_moe_rules,
        ),
        Family(OWN, "bumblebee", _read_own, _write_own, defaults={}, partial_rotary_factor=1.0),  # last: expresses every model
    )
}
