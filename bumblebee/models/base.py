"""LanguageModel: what every model has that the tasks, transforms, trainer and generator work with, whoever computes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from bumblebee.config import BumblebeeConfig


class LanguageModel(nn.Module):
    """A causal language model, called as ``Bumblebee.forward`` is.

    Attributes:
        config: its shape and special ids.
        source: the folder that the weights came from.
        files: what folders of the model consist of, where it is not the whole model of our own.
    """

    config: BumblebeeConfig
    source: Path | None = None
    files: Any = None

    @property
    def blocks(self) -> list[nn.Module]:
        """Its layers, in order."""
        raise NotImplementedError

    def checkpoint_activations(self, every: int) -> None:
        """Compute every n-th block again in the backward pass (arXiv 1604.06174).

        Raises:
            ValueError: the model cannot.
        """
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path, max_shard_size: str = "5GB") -> None:
        """Write a model folder: config.json and safetensors shards of at most ``max_shard_size``; with LoRA an adapter folder.

        Raises:
            ValueError: a size that cannot be read.
            OSError: the folder cannot be written; an earlier complete folder stays as it was.
        """
        from bumblebee.checkpoint.hf_folder import files_of, save_model

        save_model(folder, files_of(self), self.state_dict(), max_shard_size)

    def num_parameters(self) -> int:
        """Parameters, a tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())
