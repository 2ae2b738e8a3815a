"""Attaching a saved adapter to a model without merging, as PEFT computes it."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from bumblebee.checkpoint.adapters.folder import WEIGHTS
from bumblebee.checkpoint.adapters.fused import fused_modules, separate, separate_settings
from bumblebee.checkpoint.adapters.reader import Adapter
from bumblebee.lora import peft_layers
from bumblebee.lora.targets import adapter_rules


def attach(model: nn.Module, folder: Path) -> None:
    """Attach the updates of an adapter folder to its base model, unmerged.

    Raises:
        ValueError: not an adapter folder, an unsupported setting, or an adapter of another model.
    """
    scales = Adapter(folder).scales()  # raises for unsupported adapters
    config = peft_layers.read_config(folder)
    weights, modules = load_file(folder / WEIGHTS), fused_modules(adapter_rules(model))
    if modules.keys() & scales.keys():
        rows = {name: module.out_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        weights = separate(weights, modules, rows)
        scales |= {name: scales[fused] for fused, names in modules.items() if fused in scales for name in names}
        for setting, value in separate_settings(weights, scales, config.use_rslora).items():
            setattr(config, setting, value)
    peft_layers.inject(model, config)
    if unexpected := peft_layers.load_adapter(model, weights):
        raise ValueError(f"{folder / WEIGHTS} has {unexpected[0]}, which matches nothing in the base model")
