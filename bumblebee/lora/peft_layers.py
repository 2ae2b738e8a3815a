"""Wrapping layers in PEFT's. The only file that imports peft."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bumblebee.checkpoint.adapters.writer import ADAPTER_NAME, is_adapter_key
from bumblebee.lora.switch import adapter_layers
from bumblebee.lora.targets import Targets
from bumblebee.models.huggingface import weights_gathered
from bumblebee.models.load_context import current_load_context
from bumblebee.nn.moe import Experts

if TYPE_CHECKING:
    from peft import LoraConfig


def create_config(
    base: Path,
    *,
    r: int,
    lora_alpha: int,
    lora_dropout: float,
    target_modules: Targets,
    target_parameters: list[str] | None,
    use_dora: bool,
    use_rslora: bool,
) -> LoraConfig:
    """Create PEFT's LoraConfig for a causal language model."""
    from peft import LoraConfig, TaskType

    path = str(base.resolve())  # absolute, so that it is valid in any working directory
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=path,
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_modules,
        target_parameters=target_parameters,
        use_dora=use_dora,
        use_rslora=use_rslora,
    )


def save_score_head(config: LoraConfig) -> None:
    """Describe the adapter of a reward model, whose head is trained and saved with it."""
    from peft import TaskType

    config.task_type, config.modules_to_save = TaskType.SEQ_CLS, ["score"]


def read_config(folder: Path) -> LoraConfig:
    """Read the LoraConfig of an adapter folder."""
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    config.modules_to_save = None  # the head of a reward model, which is a plain module of ours
    return config


def load_adapter(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Load an adapter's state dict into injected layers; returns unexpected keys."""
    from peft import set_peft_model_state_dict

    result: Any = set_peft_model_state_dict(model, dict(weights), adapter_name=ADAPTER_NAME)  # a named tuple without a type
    return result.unexpected_keys


def inject(model: nn.Module, config: LoraConfig) -> None:
    """Replace layers by PEFT's, in place, and freeze everything else."""
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice applies to other uses
        inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter_key(name))  # and the head of a reward model
    for layer in adapter_layers(model):
        # Weights of other modules that these modules read, which ZeRO-3 must gather. A tuple: torch does not register it.
        for dora in getattr(layer, "lora_magnitude_vector", {}).values():
            dora.reads = (layer.get_base_layer(),)
        if isinstance(base := layer.get_base_layer(), Experts):
            layer.reads = (base, *layer.lora_A.values(), *layer.lora_B.values())


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Initialize A like ``nn.Linear``, from the seed and the name: the same on all ranks at all stages. PEFT has zeroed B."""
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            continue
        value = parameter.float()
        if ".lora_A." in name:
            digest = hashlib.sha256(f"{torch.initial_seed()} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            bound = 1 / math.sqrt(parameter.shape[1])
            value = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator).to(parameter.device)
        # PEFT has cast adapters to the base weight's dtype. The engine keeps fp32 copies, except for a sharded model.
        parameter.data = value.to(parameter.dtype) if current_load_context().sharded else value


@contextmanager
def unsharded_adapters() -> Iterator[None]:
    """Create adapters unsharded even under ZeRO-3; they are small, and are partitioned when training starts."""
    if not current_load_context().sharded:
        yield
        return
    from bumblebee.distributed.deepspeed.zero_init import unsharded_init

    with unsharded_init(), weights_gathered():  # PEFT reads the base weights for DoRA
        yield
