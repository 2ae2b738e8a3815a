"""Low-rank updates of layers that a family's files fuse into one tensor or name differently, converted exactly both ways.

The file's W is the model's W1, W2 ... stacked along the rows, so the update of W combines theirs, with the sum of their ranks:

    B A  =  [[B1, 0], [0, B2]] [[A1], [A2]]

In the other direction, the rows of B that belong to W1, together with all of A, are an update of W1.
PEFT scales an update by alpha / rank, so alpha grows with the rank. Folders use the layout of the files, so that PEFT applies
them to the family's model in transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from bumblebee.checkpoint.weight_mapping import Rule

FusedModules = dict[str, tuple[str, ...]]  # module in the files -> modules of the model, in order
Settings = dict[str, object]  # of adapter_config.json
PREFIX = "base_model.model."
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


def fused_modules(rules: Iterable[Rule]) -> FusedModules:
    """The linear layers that rules apply to."""
    return {
        rule.file_keys[0].removesuffix(".weight"): tuple(key.removesuffix(".weight") for key in rule.model_keys)
        for rule in rules
        if not rule.stacked and all(key.endswith(".weight") for key in (*rule.file_keys, *rule.model_keys))
    }


def fuse(updates: Mapping[str, Tensor], modules: FusedModules) -> dict[str, Tensor]:
    """Convert updates of the model's layers, by key, to the file's. Of layers that are fused, all or none must have updates."""
    updates = dict(updates)
    for fused, names in modules.items():
        for part, join in ((A, torch.cat), (B, lambda blocks: torch.block_diag(*blocks)), (MAGNITUDE, torch.cat)):
            keys = [f"{PREFIX}{name}.{part}" for name in names]
            tensors = [updates.pop(key) for key in keys if key in updates]
            assert len(tensors) in (0, len(names)), fused
            if tensors:
                updates[f"{PREFIX}{fused}.{part}"] = join(tensors).contiguous()
    return updates


def fused_settings(
    settings: Mapping[str, object], modules: FusedModules, adapted: Iterable[str], rank: int, alpha: float
) -> Settings:
    """Convert PEFT's settings for the model's layers to settings for the file's.

    Args:
        settings: of adapter_config.json.
        modules: of the family.
        adapted: modules of the model that have updates.
        rank: of each update.
        alpha: of each update.
    """
    fused_name = {name: fused for fused, names in modules.items() for name in names}
    adapted = list(adapted)
    if not fused_name.keys() & set(adapted):
        return dict(settings)
    targets = sorted({fused_name.get(name, name) for name in adapted})
    rslora = settings.get("use_rslora")
    counts = {target: len(modules[target]) for target in targets if len(modules.get(target, ())) > 1}
    return {
        **settings,
        "target_modules": targets,
        "rank_pattern": {target: count * rank for target, count in counts.items()},
        "alpha_pattern": {target: (math.sqrt(count) if rslora else count) * alpha for target, count in counts.items()},
    }


def separate(updates: Mapping[str, Tensor], modules: FusedModules, rows: Mapping[str, int]) -> dict[str, Tensor]:
    """Convert updates of the file's layers, by key, to the model's.

    Args:
        updates: by key in the file.
        modules: of the family.
        rows: number of outputs of each of the model's layers.
    """
    updates = dict(updates)
    for fused, names in modules.items():
        sizes = [rows[name] for name in names if name in rows]
        for part in (A, B, MAGNITUDE):
            tensor = updates.pop(f"{PREFIX}{fused}.{part}", None)
            if tensor is not None:
                parts = [tensor.clone() for _ in names] if part == A else tensor.split(sizes)
                updates |= {f"{PREFIX}{name}.{part}": rows_of.contiguous() for name, rows_of in zip(names, parts, strict=True)}
    return updates


def separate_settings(updates: Mapping[str, Tensor], scales: Mapping[str, float], rslora: bool) -> Settings:
    """PEFT's settings for updates that ``separate`` returned: the modules, and the rank and alpha of each.

    Args:
        updates: by key.
        scales: scale of each module's update.
        rslora: the scale is alpha / sqrt(rank) instead of alpha / rank.
    """
    ranks = {key.removeprefix(PREFIX).removesuffix(f".{A}"): len(tensor) for key, tensor in updates.items() if key.endswith(A)}
    alphas = {module: scales[module] * (math.sqrt(rank) if rslora else rank) for module, rank in ranks.items()}
    return {
        "target_modules": set(ranks),
        "rank_pattern": {re.escape(module): rank for module, rank in ranks.items()},
        "alpha_pattern": {re.escape(module): alpha for module, alpha in alphas.items()},
    }
