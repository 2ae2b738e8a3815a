"""Converting between the config.json of a family and BumblebeeConfig.

A model is written as the family that it was read as, or else as the first that expresses it exactly: reading its config.json
again gives the same config. A model that fits no family is written as Bumblebee's own architecture, which only Bumblebee reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from bumblebee.checkpoint.families.table import FAMILIES, Family, Json
from bumblebee.config import BumblebeeConfig

# Fields with the same name in every family and in BumblebeeConfig, with the defaults of Hugging Face.
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
    "residual_dropout": 0.0,  # this one and the next are for training; Hugging Face keeps and ignores them
    "embedding_dropout": 0.0,
}
# Without a version from 5.0 on, transformers warns of an "incorrect regex pattern" in any large tokenizer beside config.json:
# older versions wrote a wrong one for Mistral. Ours is read from and written to tokenizer.json as it is.
TRANSFORMERS_VERSION = "5.0.0"
# Of a language model in transformers' architectures, and of a model with a head that scores texts.
_CAUSAL, _SCORING = "ForCausalLM", "ForSequenceClassification"
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def family_of(config: BumblebeeConfig) -> Family:
    """Return the family that a model is written as: the one it was read as, or else the first that expresses its config."""
    preferred = [FAMILIES[config.architecture]] if config.architecture in FAMILIES else []
    return next(family for family in (*preferred, *FAMILIES.values()) if _expresses(family, config))


def _expresses(family: Family, config: BumblebeeConfig) -> bool:
    """Whether writing a config as this family and reading it again gives the same config."""
    try:
        return _read(family, _write(family, config)) == replace(config, architecture=None)
    except ValueError:
        return False


def is_supported(raw: Json) -> bool:
    """Whether config.json names an architecture that Bumblebee implements."""
    return any(name in FAMILIES for name in _language_models(raw))


def _language_models(raw: Json) -> Iterable[str]:
    """The architectures in config.json, with a language model's name for one that scores texts."""
    return [name.replace(_SCORING, _CAUSAL) for name in raw.get("architectures") or ()]


def _family_named(raw: Json) -> Family:
    """Look up the family by ``architectures`` in config.json."""
    names = raw.get("architectures") or []
    for name in _language_models(raw):
        if name in FAMILIES:
            return FAMILIES[name]
    raise ValueError(
        f"architectures {names} not supported: Bumblebee implements {', '.join(FAMILIES)}; for others use"
        " --task.model.class_path bumblebee.HuggingFaceModel.from_pretrained"
    )


def read_config(raw: Json) -> BumblebeeConfig:
    """Convert config.json to BumblebeeConfig.

    Raises:
        ValueError: an architecture, field or value is not supported, or a required field is missing.
    """
    family = _family_named(raw)
    config = _read(family, raw)
    return config if family_of(config) is family else replace(config, architecture=family.architecture)


def _read(family: Family, raw: Json) -> BumblebeeConfig:
    if missing := [name for name in _REQUIRED if raw.get(name) is None]:
        raise ValueError(f"config.json has no {', '.join(missing)}")
    if raw.get("quantization_config"):
        raise ValueError("config.json has a quantization_config; quantized weights are not supported")
    shared: Json = {name: raw.get(name, default) for name, default in {**_SHARED, **family.defaults}.items()}
    shared["num_key_value_heads"] = shared["num_key_value_heads"] or raw["num_attention_heads"]
    shared["attention_dropout"] = shared["attention_dropout"] or 0.0  # may be null
    shared["score_head"] = _has_score_head(raw)
    return BumblebeeConfig(**{**shared, **_read_rope(family, raw), **family.read(raw)})


def _has_score_head(raw: Json) -> bool:
    """Whether the architecture is one that scores texts, with one label."""
    if not any(name.endswith(_SCORING) for name in raw.get("architectures") or ()):
        return False
    count: int = raw.get("num_labels") or len(raw.get("id2label") or {}) or 2  # the default of transformers
    if count != 1:
        raise ValueError(f"config.json has {count} labels; a classifier is not supported, only a reward model with 1 label")
    return True


def _read_rope(family: Family, raw: Json) -> Json:
    """Read either layout: ``rope_parameters`` with everything, or ``rope_theta`` and ``rope_scaling``."""
    settings = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = settings.pop("rope_theta", None) or raw.get("rope_theta") or family.defaults.get("rope_theta", 10_000.0)
    kind = settings.pop("type", None)
    settings.setdefault("rope_type", kind or "default")
    partial = settings.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor")
    partial = partial or family.partial_rotary_factor or 1.0
    if partial != 1.0 and family.partial_rotary_factor is None:
        raise ValueError(f"config.json has partial_rotary_factor {partial}, which {family.architecture} does not support")
    if settings["rope_type"] in ("llama3", "yarn"):
        settings.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    if settings["rope_type"] == "default":
        settings = {}
    return {"rope_theta": theta, "rope_scaling": settings or None, "partial_rotary_factor": partial}


def write_config(config: BumblebeeConfig, dtype: str) -> Json:
    """Convert BumblebeeConfig to a config.json that transformers loads without remote code.

    Args:
        config: the model's.
        dtype: name of the weights' dtype, e.g. "bfloat16".
    """
    return _write(family_of(config), config) | {"torch_dtype": dtype, "transformers_version": TRANSFORMERS_VERSION}


def _write(family: Family, config: BumblebeeConfig) -> Json:
    return {
        "architectures": [family.architecture.replace(_CAUSAL, _SCORING) if config.score_head else family.architecture],
        "model_type": family.model_type,
        **{name: getattr(config, name) for name in _SHARED},
        # The older layout of rope settings, which newer versions of transformers read too.
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        **({"partial_rotary_factor": config.partial_rotary_factor} if family.partial_rotary_factor else {}),
        **family.write(config),
        **({"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}} if config.score_head else {}),
    }
