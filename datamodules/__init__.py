"""DataModules: from files to batches. Classes are imported on first use.

The package name is shared with a ``datamodules`` folder of the user's; see ``bumblebee/utils/shared_packages.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bumblebee.utils.shared_packages import extend_path, lazy_attributes

if TYPE_CHECKING:
    from datamodules.preference import Preferences
    from datamodules.pretrain import Pretrain
    from datamodules.prompts import Prompts
    from datamodules.sft import SFT
    from datamodules.unpaired_preference import UnpairedPreferences

_HOME = {
    "Preferences": "datamodules.preference",
    "Pretrain": "datamodules.pretrain",
    "Prompts": "datamodules.prompts",
    "SFT": "datamodules.sft",
    "UnpairedPreferences": "datamodules.unpaired_preference",
}

__all__ = ["SFT", "Preferences", "Pretrain", "Prompts", "UnpairedPreferences"]


__path__ = extend_path(__path__, __name__, _HOME)
__getattr__ = lazy_attributes(__name__, _HOME)
