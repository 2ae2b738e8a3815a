"""Base class of all models, and the class that a model folder names.

A subclass of Bumblebee computes something else from the same weights, so its model folders name it. Importing a class runs
code: the class that a folder names is imported only if the caller trusts it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TypeVar

from torch import nn

from bumblebee.checkpoint.model_files import ModelFiles, files_of, save_model
from bumblebee.config import BumblebeeConfig
from bumblebee.nn.block_forward import BlockForward


class LanguageModel(nn.Module):
    """A causal language model, called like ``Bumblebee.forward``.

    Attributes:
        config: shape and special ids.
        source: folder that the weights were loaded from.
        files: how folders of the model are written; None for the complete model of a supported architecture.
    """

    config: BumblebeeConfig
    source: Path | None = None
    files: ModelFiles | None = None

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer layers, in order."""
        raise NotImplementedError

    def checkpoint_activations(self, every: int, keep_attention: bool = False) -> None:
        """Recompute the activations of every n-th block in the backward pass (arXiv 1604.06174).

        Args:
            every: n.
            keep_attention: keep the results of attention and recompute the rest.

        Raises:
            ValueError: not supported by the model.
        """
        for index, block in enumerate(self.blocks):
            forward = BlockForward.of(block)
            forward.recompute, forward.keep_attention = index % every == 0, keep_attention

    def save_pretrained(self, folder: str | Path, max_shard_size: str = "5GB") -> None:
        """Write a model folder: config.json and safetensors shards of at most ``max_shard_size``; with LoRA an adapter folder.

        Raises:
            ValueError: ``max_shard_size`` cannot be parsed.
            OSError: the folder cannot be written; a complete folder from before stays unchanged.
        """
        save_model(folder, files_of(self), self.state_dict(), max_shard_size)

    def num_parameters(self) -> int:
        """Number of parameters; tied parameters count once, quantized ones like others."""
        quantized = sum(getattr(module, "hidden_parameters", 0) for module in self.modules())
        return quantized + sum(parameter.numel() for parameter in self.parameters())


Model = TypeVar("Model", bound=LanguageModel)


def class_path_of(cls: type) -> str:
    """Module and name of a class, as in ``class_path`` of a recipe."""
    return f"{cls.__module__}.{cls.__qualname__}"


def resolve_model_class(cls: type[Model], folder: str | Path, config: BumblebeeConfig, trust_remote_code: bool) -> type[Model]:
    """Return the class that reads a model folder: ``cls`` if it is a subclass, else the class that the folder names.

    Args:
        cls: class whose ``from_pretrained`` was called.
        folder: the model folder, for error messages.
        config: config of the folder.
        trust_remote_code: import the class that the folder names.

    Raises:
        ValueError: the folder names a class that may not be imported or cannot be found.
    """
    if config.model_class is None or class_path_of(cls) != "bumblebee.model.Bumblebee":
        return cls
    if not trust_remote_code:
        raise ValueError(
            f"{folder} was saved by {config.model_class}, whose code would have to be imported: load it with that class"
            " instead of Bumblebee or, if you trust its code, set trust_remote_code to true"
        )
    module, _, name = config.model_class.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder} was saved by {config.model_class}, which cannot be imported: {error}") from error
