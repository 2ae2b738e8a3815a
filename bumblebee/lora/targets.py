"""Which layers of a model get adapters."""

from __future__ import annotations

import re

from torch import nn

from bumblebee.checkpoint.adapters.fused import fused_modules
from bumblebee.checkpoint.model_files import HuggingFaceModelFiles, files_of
from bumblebee.checkpoint.weight_mapping import Rule
from bumblebee.nn.lm_head import LMHead
from bumblebee.nn.score_head import ScoreHead

Targets = str | list[str]
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def resolve_targets(model: nn.Module, targets: Targets) -> Targets:
    """Check targets and expand "all-linear"; returns what PEFT takes as ``target_modules``.

    Raises:
        ValueError: a target matches nothing, or matches a module that is not a linear layer of a block.
    """
    modules = [(name, module) for name, module in model.named_modules() if not isinstance(module, LMHead | ScoreHead)]
    linear = {name for name, module in modules if isinstance(module, nn.Linear)}
    suffixes = list(dict.fromkeys(name.rpartition(".")[2] for name in sorted(linear)))
    if targets == "all-linear":
        targets = [name for name in ALL_LINEAR if name in suffixes] or ["all-linear"]
    available = f"available are {', '.join(suffixes)}"
    names = [name for name, _ in model.named_modules() if name]
    adapted: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        matches = {name for name in names if _matches(name, target, is_regex=isinstance(targets, str))}
        if not matches:
            raise ValueError(f"targets: {target!r} matches no layer; {available}, as in {min(linear)}")
        if others := sorted(matches - linear):
            raise ValueError(f"targets: {target!r} matches {others[0]}, which cannot have an adapter; {available}")
        adapted |= matches
    _check_fused(model, adapted)
    return targets


def _matches(name: str, target: str, is_regex: bool) -> bool:
    """Whether PEFT matches a module name to a target: a regular expression for complete names, or a suffix."""
    if not is_regex:
        return name == target or name.endswith(f".{target}")
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise ValueError(f"targets: {target!r} is not a valid regular expression: {error}") from error


def _check_fused(model: nn.Module, adapted: set[str]) -> None:
    """Raise if only some of the layers that the model's files fuse into one tensor are adapted."""
    for fused, names in fused_modules(adapter_rules(model)).items():
        if 0 < len(adapted & set(names)) < len(names):
            parts = ", ".join(name.rpartition(".")[2] for name in names)
            raise ValueError(f"targets: {parts} are one tensor in the model's files, {fused}: target all of them or none")


def adapter_rules(model: nn.Module) -> list[Rule]:
    """How modules of the family's transformers model, which PEFT's adapters refer to, map to the model's."""
    files = files_of(model)
    return [] if isinstance(files, HuggingFaceModelFiles) else files.rules()
