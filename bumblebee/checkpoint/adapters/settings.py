"""adapter_config.json: which settings of PEFT are supported, and rank and alpha of each module."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from bumblebee.checkpoint.adapters.folder import CONFIG
from bumblebee.utils.json_files import read_json

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")  # parameters that LoRA(experts=True) adapts

# Settings that do not change the merged weights. Any other setting must be unset, so that none is silently ignored.
_IGNORED = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size",
    "r", "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type", "use_dora",
    "use_rslora",
}  # fmt: skip
# Initializations that leave the base weights unchanged; others (PiSSA, OLoRA ...) subtract from them.
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


class AdapterSettings:
    """The settings of an adapter folder.

    Args:
        folder: an adapter folder.

    Raises:
        ValueError: a setting is not supported; the message names the file and the setting.
    """

    def __init__(self, folder: Path) -> None:
        self.raw = read_json(folder / CONFIG)
        _check(folder / CONFIG, self.raw)
        self.dora, self.rslora = bool(self.raw.get("use_dora")), bool(self.raw.get("use_rslora"))
        self.experts = [key for key in EXPERTS if any(_ends_with(key, name) for name in _target_parameters(self.raw))]

    def scale(self, module: str, rank: int) -> float:
        """The factor of a module's update: alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)."""
        patterns = self.raw.get("alpha_pattern") or {}
        alphas = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
        alpha = next(alphas, self.raw["lora_alpha"])
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _ends_with(key: str, name: str) -> bool:
    return f".{key}".endswith(f".{name}")


def _target_parameters(settings: dict[str, Any]) -> list[str]:
    return settings.get("target_parameters") or []


def _check(file: Path, settings: dict[str, Any]) -> None:
    """Reject settings that would give other weights than PEFT's."""
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{file} has peft_type {settings.get('peft_type')!r}; only 'LORA' is supported")
    if not isinstance(settings.get("lora_alpha"), int | float):
        raise ValueError(f"{file} has lora_alpha {settings.get('lora_alpha')!r}; expected a number")
    if settings.get("init_lora_weights") not in _INITIALIZATIONS:
        raise ValueError(f"{file} has init_lora_weights {settings['init_lora_weights']!r}, which changes the base's weights")
    for name in _target_parameters(settings):
        if not any(_ends_with(key, name) for key in EXPERTS):
            raise ValueError(f"{file} has target_parameters {name!r}; supported are {', '.join(EXPERTS)}")
    saved = settings.get("modules_to_save") or []
    if set(saved) - {"classifier", "score"}:  # PEFT names both for any model that scores texts
        raise ValueError(f"{file} has modules_to_save {saved!r}, which is not supported; a reward model's 'score' is")
    for name, value in settings.items():
        if name not in _IGNORED and name != "init_lora_weights" and value not in (None, False, "none", [], {}):
            raise ValueError(f"{file} has {name} {value!r}, which is not supported")
