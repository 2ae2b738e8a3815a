"""Which Hugging Face architectures are read and written: how their config.json translates, and their state-dict keys.

The one lookup is config.json's ``architectures``. What a family can express and we do not compute is refused by name: a setting
is never ignored. A model is written as the first family that computes just what it does: whose config.json, read again, gives
the same config. A model that no family has is written as our own architecture, which only we read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from bumblebee.checkpoint import dense_families, moe_families
from bumblebee.checkpoint.weight_mapping import Rule
from bumblebee.config import BumblebeeConfig

Json = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture.

    Args:
        architecture: its name in config.json.
        model_type: its other name there.
        read: config.json -> the fields that only this family has.
        write: the same fields back.
        defaults: what its config.json may leave out and Hugging Face fills in otherwise than for other families.
        partial_rotary_factor: what its config.json means where it does not say; None where heads are always turned as a whole.
        rules: for a config, how its files' tensors differ from ours; see ``bumblebee/checkpoint/weight_mapping.py``.
        unused_keys: endings of weights that some files hold and no computation needs.
    """

    architecture: str
    model_type: str
    read: Callable[[Json], Json]
    write: Callable[[BumblebeeConfig], Json]
    defaults: Json
    partial_rotary_factor: float | None = None
    rules: Callable[[BumblebeeConfig], list[Rule]] = lambda config: []
    unused_keys: tuple[str, ...] = ("rotary_emb.inv_freq",)


OWN = "BumblebeeForCausalLM"  # transformers does not know it and says so


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
            dense_families.read_qwen2,
            dense_families.write_qwen_windows,
            defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
        ),
        Family(
            "LlamaForCausalLM",
            "llama",
            dense_families.read_llama,
            lambda c: {"attention_bias": c.attention_bias, "mlp_bias": c.mlp_bias},
            defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        ),
        Family(
            "Qwen3ForCausalLM",
            "qwen3",
            dense_families.read_qwen3,
            lambda c: {"attention_bias": c.attention_bias, **dense_families.write_qwen_windows(c)},
            defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
        ),
        Family(
            "MistralForCausalLM",
            "mistral",
            dense_families.read_mistral,
            lambda c: {"sliding_window": c.sliding_window},
            defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "bos_token_id": 1, "eos_token_id": 2},
        ),
        Family(
            "GlmForCausalLM",
            "glm",
            dense_families.read_glm,
            lambda c: {"attention_bias": c.attention_bias},
            defaults=dense_families.GLM_DEFAULTS,
            partial_rotary_factor=0.5,
            rules=dense_families.glm_rules,
        ),
        Family(
            "Glm4ForCausalLM",
            "glm4",
            dense_families.read_glm4,
            lambda c: {"attention_bias": c.attention_bias},
            defaults=dense_families.GLM_DEFAULTS,
            partial_rotary_factor=0.5,
            rules=dense_families.glm_rules,
        ),
        Family(
            "MixtralForCausalLM",
            "mixtral",
            moe_families.read_mixtral,
            moe_families.write_mixtral,
            defaults={
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            rules=moe_families.mixtral_rules,
        ),
        Family(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            moe_families.read_qwen3_moe,
            moe_families.write_qwen3_moe,
            defaults={"num_key_value_heads": 4, "max_position_embeddings": 32768},
            rules=moe_families.qwen_moe_rules,
        ),
        Family(
            "Qwen2MoeForCausalLM",
            "qwen2_moe",
            moe_families.read_qwen2_moe,
            moe_families.write_qwen2_moe,
            defaults={"num_key_value_heads": 16, "max_position_embeddings": 32768},
            rules=moe_families.qwen_moe_rules,
        ),
        Family(OWN, "bumblebee", _read_own, _write_own, defaults={}, partial_rotary_factor=1.0),  # the last: it has every model
    )
}

# Fields that every family calls by our own name, with what Hugging Face takes when a file leaves them out.
_SHARED: Json = {
    "vocab_size": None,
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,  # this and the next are for training only: Hugging Face keeps them and does not look at them
    "embedding_dropout": 0.0,
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def family_of(config: BumblebeeConfig) -> Family:
    """The family that a model is written as: the one it was read as, or else the first whose arithmetic its config is."""
    preferred = [FAMILIES[config.architecture]] if config.architecture in FAMILIES else []
    return next(family for family in (*preferred, *FAMILIES.values()) if _has(family, config))


def _has(family: Family, config: BumblebeeConfig) -> bool:
    """Whether a family computes what a config asks for."""
    try:
        return _read(family, _write(family, config)) == replace(config, architecture=None)
    except ValueError:
        return False


def is_supported(raw: Json) -> bool:
    """Whether a config.json names an architecture of ours."""
    return any(name in FAMILIES for name in raw.get("architectures") or ())


def family_named(raw: Json) -> Family:
    """The family that a config.json names.

    Raises:
        ValueError: no architecture, or one that is not supported.
    """
    names = raw.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise ValueError(
        f"architectures {names}: Bumblebee computes {', '.join(FAMILIES)}; others run with"
        " --task.model.class_path bumblebee.HuggingFaceModel.from_pretrained"
    )


def read_config(raw: Json) -> BumblebeeConfig:
    """config.json -> BumblebeeConfig.

    Raises:
        ValueError: an architecture, field or value that is not supported, or a required field left out.
    """
    family = family_named(raw)
    config = _read(family, raw)
    return config if family_of(config) is family else replace(config, architecture=family.architecture)


def _read(family: Family, raw: Json) -> BumblebeeConfig:
    if missing := [name for name in _REQUIRED if raw.get(name) is None]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    if raw.get("quantization_config"):
        raise ValueError("config.json has a quantization_config; quantised weights are not supported")
    shared: Json = {name: raw.get(name, default) for name, default in {**_SHARED, **family.defaults}.items()}
    shared["num_key_value_heads"] = shared["num_key_value_heads"] or raw["num_attention_heads"]
    shared["attention_dropout"] = shared["attention_dropout"] or 0.0  # may be null
    return BumblebeeConfig(**{**shared, **_read_rope(family, raw), **family.read(raw)})


def _read_rope(family: Family, raw: Json) -> Json:
    """Both layouts: ``rope_parameters`` with everything in it, or ``rope_theta`` with ``rope_scaling`` beside it."""
    settings = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = settings.pop("rope_theta", None) or raw.get("rope_theta") or family.defaults.get("rope_theta", 10_000.0)
    kind = settings.pop("type", None)
    settings.setdefault("rope_type", kind or "default")
    partial = settings.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor")
    partial = partial or family.partial_rotary_factor or 1.0
    if partial != 1.0 and family.partial_rotary_factor is None:
        raise ValueError(f"config.json has partial_rotary_factor {partial}, which {family.architecture} does not have")
    if settings["rope_type"] in ("llama3", "yarn"):
        settings.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    if settings["rope_type"] == "default":
        settings = {}
    return {"rope_theta": theta, "rope_scaling": settings or None, "partial_rotary_factor": partial}


def write_config(config: BumblebeeConfig, dtype: str) -> Json:
    """BumblebeeConfig -> config.json that transformers loads without remote code.

    Args:
        config: the model's shape.
        dtype: name of the weights' dtype, e.g. "bfloat16".
    """
    return _write(family_of(config), config) | {"torch_dtype": dtype}


def _write(family: Family, config: BumblebeeConfig) -> Json:
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{name: getattr(config, name) for name in _SHARED},
        # The older layout of rope settings: newer readers take it too.
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        **({"partial_rotary_factor": config.partial_rotary_factor} if family.partial_rotary_factor else {}),
        **family.write(config),
    }
