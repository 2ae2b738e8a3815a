"""Attaching a saved adapter to a model without merging, as PEFT computes it."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from bumblebee.checkpoint.adapters.folder import SCORE, WEIGHTS
from bumblebee.checkpoint.adapters.fused import fused_modules, separate, separate_settings
from bumblebee.checkpoint.adapters.reader import Adapter
from bumblebee.lora import peft_layers
from bumblebee.lora.targets import adapter_rules
from bumblebee.model import Bumblebee


def attach(model: nn.Module, folder: Path) -> None:
    """Attach the updates of an adapter folder to its base model, unmerged.

    Raises:
        ValueError: not an adapter folder, an unsupported setting, or an adapter of another model.
    """
    adapter = Adapter(folder)  # raises for unsupported adapters
    scales = adapter.scales()
    config = peft_layers.read_config(folder)
    weights, modules = load_file(folder / WEIGHTS), fused_modules(adapter_rules(model))
    if modules.keys() & scales.keys():
        rows = {name: module.out_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        weights = separate(weights, modules, rows)
        scales |= {name: scales[fused] for fused, names in modules.items() if fused in scales for name in names}
        for setting, value in separate_settings(weights, scales, config.use_rslora).items():
            setattr(config, setting, value)
    if adapter.has_head and isinstance(model, Bumblebee):
        model.become_reward_model()
        model.score.load_state_dict({"weight": weights.pop(f"base_model.model.{SCORE}")})
    peft_layers.inject(model, config)
    if unexpected := peft_layers.load_adapter(model, weights):
        raise ValueError(f"{folder / WEIGHTS} has {unexpected[0]}, which matches nothing in the base model")
