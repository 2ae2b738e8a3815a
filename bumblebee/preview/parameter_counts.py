"""What a model's parameters are for, by part."""

from __future__ import annotations

import re

from torch import nn

from bumblebee.checkpoint.adapters import is_adapter_key
from bumblebee.distributed.deepspeed.sharded_parameters import full_numel
from bumblebee.nn.lm_head import Head

# By the names that Hugging Face's models have; the first that fits counts.
_PARTS = {"attention": r"(^|\.)(self_attn|attention|attn)\.", "feed-forward": r"(^|\.)(mlp|ffn|feed_forward|experts)\."}


def parts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """For each part (parameters, trained ones). A table that is both embedding and head counts once, as embedding."""
    tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    heads = {id(p) for module in model.modules() if isinstance(module, Head) for p in module.parameters()}
    tied = bool(tables & heads)
    found: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        part = _part(name, id(parameter) in tables, id(parameter) in heads, tied)
        count, trained = found.get(part, (0, 0))
        size = full_numel(parameter)
        found[part] = count + size, trained + size * parameter.requires_grad
    order = ["embedding", "embedding and head", *_PARTS, "adapters", "head", "norms and others"]
    return {part: found[part] for part in order if part in found}


def _part(name: str, in_table: bool, in_head: bool, tied: bool) -> str:
    if in_table:
        return "embedding and head" if tied and in_head else "embedding"
    if in_head or name.startswith("lm_head."):
        return "head"
    if is_adapter_key(name):
        return "adapters"
    return next((part for part, pattern in _PARTS.items() if re.search(pattern, name)), "norms and others")
