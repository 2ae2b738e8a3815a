"""Model families: the Hugging Face architectures that Bumblebee implements, and their config.json."""

from bumblebee.checkpoint.families.config_json import TRANSFORMERS_VERSION, family_of, is_supported, read_config, write_config
from bumblebee.checkpoint.families.moe import expert_shapes
from bumblebee.checkpoint.families.table import FAMILIES, OWN, Family

__all__ = [
    "FAMILIES",
    "OWN",
    "TRANSFORMERS_VERSION",
    "Family",
    "expert_shapes",
    "family_of",
    "is_supported",
    "read_config",
    "write_config",
]
