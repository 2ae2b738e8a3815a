"""Low-rank updates of layers that a family's files keep together in one tensor, or under another name: exact both ways.

The file's W is our W1, W2 ... on top of each other, and so the update of W is made of theirs, of the sum of their ranks:

    B A  =  [[B1, 0], [0, B2]] [[A1], [A2]]

Back, the rows of B that belong to W1, with all of A, are an update of W1.
PEFT scales by alpha / rank: with a larger rank goes an alpha that keeps the scale. Folders are in the file's layout, so that
PEFT and others read them over the family's own model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bumblebee.checkpoint.weight_mapping import Rule

Modules = dict[str, tuple[str, ...]]  # a module of the family's -> ours, in order
PREFIX = "base_model.model."
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


def fused_modules(rules: Iterable[Rule]) -> Modules:
    """The linear layers that rules are about."""
    return {
        rule.theirs[0].removesuffix(".weight"): tuple(key.removesuffix(".weight") for key in rule.ours)
        for rule in rules
        if not rule.stacked and all(key.endswith(".weight") for key in (*rule.theirs, *rule.ours))
    }


def fuse(found: dict[str, Tensor], modules: Modules) -> dict[str, Tensor]:
    """Our updates, by their keys in a file -> the family's. Layers that are fused are all updated, or none of them is."""
    found = dict(found)
    for theirs, ours in modules.items():
        parts = {kind: [found.pop(f"{PREFIX}{module}.{kind}", None) for module in ours] for kind in (A, B, MAGNITUDE)}
        whole = {kind: [x for x in tensors if x is not None] for kind, tensors in parts.items()}
        assert all(len(tensors) in (0, len(ours)) for tensors in whole.values()), theirs
        for kind, join in ((A, torch.cat), (B, lambda blocks: torch.block_diag(*blocks)), (MAGNITUDE, torch.cat)):
            if whole[kind]:
                found[f"{PREFIX}{theirs}.{kind}"] = join(whole[kind]).contiguous()
    return found


def fused_settings(settings: Mapping[str, Any], modules: Modules, adapted: Iterable[str]) -> dict[str, Any]:
    """PEFT's settings for updates of our modules -> those for the family's.

    Args:
        settings: of adapter_config.json.
        modules: of the family.
        adapted: our modules that have updates.
    """
    by_ours = {module: theirs for theirs, ours in modules.items() for module in ours}
    names = list(adapted)
    if not by_ours.keys() & set(names):
        return dict(settings)
    targets = sorted({by_ours.get(name, name) for name in names})
    ranks, alphas = dict(settings.get("rank_pattern") or {}), dict(settings.get("alpha_pattern") or {})
    for theirs in targets:
        if (count := len(modules.get(theirs, ()))) > 1:
            grown = math.sqrt(count) if settings.get("use_rslora") else count
            ranks[theirs], alphas[theirs] = count * settings["r"], grown * settings["lora_alpha"]
    return {**settings, "target_modules": targets, "rank_pattern": ranks, "alpha_pattern": alphas}


def separate(found: dict[str, Tensor], modules: Modules, rows: Mapping[str, int]) -> dict[str, Tensor]:
    """The family's updates -> ours.

    Args:
        found: by their keys in the file.
        modules: of the family.
        rows: outputs of our modules.
    """
    found = dict(found)
    for theirs, ours in modules.items():
        whole = {kind: found.pop(f"{PREFIX}{theirs}.{kind}", None) for kind in (A, B, MAGNITUDE)}
        sizes = [rows[module] for module in ours if module in rows]
        for kind, tensor in whole.items():
            if tensor is not None:
                parts = [tensor.clone() for _ in ours] if kind == A else tensor.split(sizes)
                found |= {f"{PREFIX}{module}.{kind}": part.contiguous() for module, part in zip(ours, parts, strict=True)}
    return found


def separate_settings(found: Mapping[str, Tensor], scales: Mapping[str, float], rslora: bool) -> dict[str, Any]:
    """What PEFT has to know of updates that ``separate`` gave: the modules, and rank and alpha of each.

    Args:
        found: the updates.
        scales: of each module's update.
        rslora: alpha is divided by the root of the rank.
    """
    ranks = {key.removeprefix(PREFIX).removesuffix(f".{A}"): len(tensor) for key, tensor in found.items() if key.endswith(A)}
    alphas = {module: scales[module] * (math.sqrt(rank) if rslora else rank) for module, rank in ranks.items()}
    return {
        "target_modules": set(ranks),
        "rank_pattern": {re.escape(module): rank for module, rank in ranks.items()},
        "alpha_pattern": {re.escape(module): alpha for module, alpha in alphas.items()},
    }
