"""What a model takes over from its data's tokenizer, and whether it has room for the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bumblebee.datamodule import DataModule
from bumblebee.tokenizer.tokenizer import Tokenizer


def adopt_tokenizer(model: nn.Module, tokenizer: Tokenizer, stop_ids: Sequence[int] = ()) -> None:
    """Check that the model has a row for each of the tokenizer's ids, and take over special ids that it does not know.

    Args:
        model: its config learns the ids.
        tokenizer: of the data.
        stop_ids: more ids that end a text, such as the one that ends an answer.

    Raises:
        ValueError: the tokenizer has more ids, or others than the one in the folder that the model was read from.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        return
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is {config.vocab_size}: take the model's own"
            f" tokenizer, or make a new model larger: --task.model.config.vocab_size {tokenizer.vocab_size}"
        )
    _check_folder(getattr(model, "source", None), tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # a new model learns them from its tokenizer
        if getattr(config, name) is None:
            setattr(config, name, getattr(tokenizer, name))
    if new := [index for index in stop_ids if index not in config.eos_token_ids]:
        config.eos_token_id = [*config.eos_token_ids, *new]


def check_length(model: nn.Module, data: DataModule) -> None:
    """Refuse texts for which a model has no positions. Positions that are turned, not looked up, have no end.

    Raises:
        ValueError: data.max_length is longer than the table of positions.
    """
    longest, config = getattr(data, "max_length", None), getattr(model, "config", None)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if longest is None or config is None or len(tables) < 2 or longest <= config.max_position_embeddings:
        return
    raise ValueError(
        f"data.max_length is {longest}, and the model has a table of {config.max_position_embeddings} positions:"
        f" take --data.max_length {config.max_position_embeddings}"
    )


def _check_folder(folder: Path | None, tokenizer: Tokenizer) -> None:
    """An id must stand for what it stood for when the model was trained; new tokens may be added."""
    if (
        folder is None
        or not (folder / "tokenizer.json").is_file()
        or Path(tokenizer.name_or_path).resolve() == folder.resolve()
    ):
        return
    ids = tokenizer.backend.get_vocab(with_added_tokens=True)
    learned = Tokenizer.from_pretrained(folder).backend.get_vocab(with_added_tokens=True)
    if other := next((token for token, index in learned.items() if ids.get(token) != index), None):
        raise ValueError(
            f"data.tokenizer is not that of the model in {folder}, where {other!r} has the id {learned[other]}:"
            f" take --data.tokenizer {folder}"
        )
