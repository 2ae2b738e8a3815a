"""The class that a model folder was written by, where it is not Bumblebee itself.

A subclass computes something else from the same weights, so its folder names it. Importing a class runs code: that of a folder
which somebody else has written is imported only where the caller asks for it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from bumblebee.config import BumblebeeConfig


def path_of(cls: type) -> str:
    """A class's module and name, as ``class_path`` in a recipe."""
    return f"{cls.__module__}.{cls.__qualname__}"


def class_for(cls: type, folder: str | Path, config: BumblebeeConfig, trust_remote_code: bool) -> Any:
    """The class that a folder is to be loaded with: the caller's own subclass, or the one that the folder names.

    Args:
        cls: whose ``from_pretrained`` was called.
        folder: for messages.
        config: of the folder.
        trust_remote_code: import the class that the folder names.

    Raises:
        ValueError: the folder names a class that may not be imported or cannot be found.
    """
    if config.model_class is None or path_of(cls) != "bumblebee.model.Bumblebee":
        return cls
    if not trust_remote_code:
        raise ValueError(
            f"{folder} holds a {config.model_class}, whose code would have to be imported: name that class instead of"
            " Bumblebee, or, if you trust its code, set trust_remote_code to true"
        )
    module, _, name = config.model_class.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder} holds a {config.model_class}, which cannot be imported here: {error}") from error
