"""Consolidate: turns each checkpoint into a model folder from the pieces that the ranks have saved, without gathering.

For runs that are too large to gather at every save: ``callbacks.checkpoint.model: false`` writes only the pieces, and this
callback puts them together on rank 0, in memory for about one output file, while the others train on.
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
        dtype: auto for the precision that is trained in, or float32, bfloat16, float16.
        max_shard_size: largest file, such as "5GB".
    """

    def __init__(self, dtype: str = "auto", max_shard_size: str = "5GB") -> None:
        self.dtype, self.max_shard_size = dtype, max_shard_size

    def on_checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        """The checkpoint is complete; add the model's files to it."""
        from bumblebee.checkpoint.consolidate import consolidate

        if trainer.is_main:
            consolidate(path, path, self.dtype, self.max_shard_size)
