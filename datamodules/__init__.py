"""DataModules: from people's files to batches. Imported on first use, so that a recipe can name one without waiting for it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.preference import Preferences
    from datamodules.pretrain import Pretrain
    from datamodules.sft import SFT

_HOME = {"Preferences": "datamodules.preference", "Pretrain": "datamodules.pretrain", "SFT": "datamodules.sft"}

__all__ = ["SFT", "Preferences", "Pretrain"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'datamodules' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
