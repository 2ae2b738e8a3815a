"""Bumblebee: pretrain, fine-tune, align and serve language models, with nothing hidden.

The public names are imported on first use, so that ``import bumblebee`` and ``bumblebee --help`` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bumblebee.callback import Callback
    from bumblebee.config import BumblebeeConfig
    from bumblebee.datamodule import DataModule
    from bumblebee.inference.generator import Generator
    from bumblebee.inference.sampling.sampling_params import SamplingParams
    from bumblebee.model import Bumblebee
    from bumblebee.models.huggingface import HuggingFaceModel
    from bumblebee.tasks.cpo import CPO
    from bumblebee.tasks.distillation import Distillation
    from bumblebee.tasks.dpo import DPO
    from bumblebee.tasks.grpo import GRPO
    from bumblebee.tasks.kto import KTO
    from bumblebee.tasks.language_modeling import LanguageModeling
    from bumblebee.tasks.orpo import ORPO
    from bumblebee.tasks.reward_model import RewardModel
    from bumblebee.tasks.simpo import SimPO
    from bumblebee.tasks.task import Task
    from bumblebee.tokenizer.tokenizer import Tokenizer
    from bumblebee.trainer import Trainer

__version__ = "0.2.0"

_HOME = {
    "Bumblebee": "bumblebee.model",
    "BumblebeeConfig": "bumblebee.config",
    "CPO": "bumblebee.tasks.cpo",
    "Callback": "bumblebee.callback",
    "DPO": "bumblebee.tasks.dpo",
    "DataModule": "bumblebee.datamodule",
    "Distillation": "bumblebee.tasks.distillation",
    "GRPO": "bumblebee.tasks.grpo",
    "Generator": "bumblebee.inference.generator",
    "HuggingFaceModel": "bumblebee.models.huggingface",
    "KTO": "bumblebee.tasks.kto",
    "LanguageModeling": "bumblebee.tasks.language_modeling",
    "ORPO": "bumblebee.tasks.orpo",
    "RewardModel": "bumblebee.tasks.reward_model",
    "SamplingParams": "bumblebee.inference.sampling.sampling_params",
    "SimPO": "bumblebee.tasks.simpo",
    "Task": "bumblebee.tasks.task",
    "Tokenizer": "bumblebee.tokenizer.tokenizer",
    "Trainer": "bumblebee.trainer",
}

__all__ = [
    "Bumblebee",
    "BumblebeeConfig",
    "CPO",
    "Callback",
    "DPO",
    "DataModule",
    "Distillation",
    "GRPO",
    "Generator",
    "HuggingFaceModel",
    "KTO",
    "LanguageModeling",
    "ORPO",
    "RewardModel",
    "SamplingParams",
    "SimPO",
    "Task",
    "Tokenizer",
    "Trainer",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'bumblebee' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
