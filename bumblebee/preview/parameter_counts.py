"""Parameter counts by component."""

from __future__ import annotations

import re

from torch import nn

from bumblebee.checkpoint.adapters.writer import is_adapter_key
from bumblebee.distributed.deepspeed.sharded_parameters import full_numel
from bumblebee.nn.lm_head import LMHead

# By Hugging Face's parameter names; the first match counts.
_COMPONENTS = {"attention": r"(^|\.)(self_attn|attention|attn)\.", "mlp": r"(^|\.)(mlp|ffn|feed_forward|experts)\."}


def count_by_component(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Total and trainable parameters of each component. A tied embedding and LM head count once."""
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    heads = {id(p) for module in model.modules() if isinstance(module, LMHead) for p in module.parameters()}
    tied = bool(embeddings & heads)
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        component = _component(name, id(parameter) in embeddings, id(parameter) in heads, tied)
        total, trainable = counts.get(component, (0, 0))
        size = full_numel(parameter)
        counts[component] = total + size, trainable + size * parameter.requires_grad
    order = ["embedding", "embedding and head", *_COMPONENTS, "adapters", "head", "norms and others"]
    return {component: counts[component] for component in order if component in counts}


def _component(name: str, in_embedding: bool, in_head: bool, tied: bool) -> str:
    if in_embedding:
        return "embedding and head" if tied and in_head else "embedding"
    if in_head or name.startswith(("lm_head.", "score.")):
        return "head"
    if is_adapter_key(name):
        return "adapters"
    return next((component for component, pattern in _COMPONENTS.items() if re.search(pattern, name)), "norms and others")
