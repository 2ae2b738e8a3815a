"""Consolidate: write the model folder of each checkpoint from the shards that the ranks saved, without a gather.

For runs that are too large to gather at every save: ``callbacks.checkpoint.model: false`` saves only the training state, and
this callback merges its shards on rank 0 while the other ranks continue. It needs memory for about one output file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bumblebee.callback import Callback

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer


class Consolidate(Callback):
    """Writes the weights of each checkpoint as safetensors, from its training state.

    Args:
        dtype: auto for the training precision, or float32, bfloat16, float16.
        max_shard_size: largest file, such as "5GB".
    """

    def __init__(self, dtype: str = "auto", max_shard_size: str = "5GB") -> None:
        self.dtype, self.max_shard_size = dtype, max_shard_size

    def on_checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        """Add the model files to a complete checkpoint."""
        from bumblebee.checkpoint.consolidate import consolidate

        if trainer.is_main:
            consolidate(path, path, self.dtype, self.max_shard_size, verify=False)  # just written
