"""Checks that a model and a task fit the data, its tokenizer and length, and adoption of the tokenizer's special ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from bumblebee.config import BumblebeeConfig
from bumblebee.datamodule import DataModule
from bumblebee.tokenizer.tokenizer import Tokenizer
from bumblebee.tokenizer.vocab_merges import has_vocab_and_merges


def adopt_tokenizer(model: nn.Module, tokenizer: Tokenizer, stop_ids: Sequence[int] = ()) -> None:
    """Check that the model has an embedding for each of the tokenizer's ids, and adopt special ids that its config lacks.

    Args:
        model: its config receives the ids.
        tokenizer: the data's.
        stop_ids: further end-of-sequence ids, such as the end-of-turn token.

    Raises:
        ValueError: the tokenizer has more ids than the model, or other ids than the tokenizer in the model's folder.
    """
    config: BumblebeeConfig | None = getattr(model, "config", None)
    if config is None:
        return
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is {config.vocab_size}; use the model's own"
            f" tokenizer, or a larger new model: --task.model.config.vocab_size {tokenizer.vocab_size}"
        )
    _check_folder(getattr(model, "source", None), tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # a new model has none
        if getattr(config, name) is None:
            setattr(config, name, getattr(tokenizer, name))
    if new := [index for index in stop_ids if index not in config.eos_token_ids]:
        config.eos_token_id = [*config.eos_token_ids, *new]


def check_vocabulary(role: str, folder: str, config: BumblebeeConfig, tokenizer: Tokenizer | None) -> None:
    """Check that a further model has an embedding for each of the tokenizer's ids.

    Args:
        role: of the model, for the error.
        folder: of the model.
        config: of the model.
        tokenizer: the data's; None is not checked.

    Raises:
        ValueError: it has fewer.
    """
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{role}: the tokenizer has {tokenizer.vocab_size} ids, but the model in {folder} has a vocab_size of"
            f" {config.vocab_size}"
        )


def check_predicts_tokens(model: nn.Module) -> None:
    """Check that a model is not a reward model.

    Raises:
        ValueError: it is.
    """
    if getattr(getattr(model, "config", None), "score_head", False):
        folder = getattr(model, "source", None) or "the model"
        raise ValueError(f"task.model: {folder} is a reward model, which scores texts: only bumblebee.RewardModel trains it")


def check_learnable(task: str, data: DataModule, samples_answers: bool = False) -> None:
    """Check that each sample is one text to learn from.

    Args:
        task: name of the task, for the error.
        data: prepared or not.
        samples_answers: the task samples the answers to prompts that have none.

    Raises:
        ValueError: samples have several answers, some of them bad ones, or none.
    """
    name = type(data).__name__
    if data.rows_per_sample != 1:
        raise ValueError(
            f"data: {task} would learn the bad answers of {name}, too: use a task for preferences, such as"
            " bumblebee.DPO or bumblebee.KTO, or datamodules.SFT with records of good answers"
        )
    if not data.has_targets and not samples_answers:
        raise ValueError(
            f"data: {task} learns from answers, and {name} has prompts only: use datamodules.SFT, or bumblebee.GRPO"
        )


def check_length(model: nn.Module, data: DataModule) -> None:
    """Check that learned position embeddings cover data.max_length. Rotary embeddings have no hard length limit.

    Raises:
        ValueError: data.max_length exceeds the number of position embeddings.
    """
    max_length, config = getattr(data, "max_length", None), getattr(model, "config", None)
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if max_length is None or config is None or len(embeddings) < 2 or max_length <= config.max_position_embeddings:
        return
    raise ValueError(
        f"data.max_length is {max_length}, but the model has {config.max_position_embeddings} position embeddings;"
        f" use --data.max_length {config.max_position_embeddings}"
    )


def _check_folder(folder: Path | None, tokenizer: Tokenizer) -> None:
    """Check that the tokenizer has the same ids as the one in the model's folder; added tokens are accepted."""
    if (
        folder is None
        or not ((folder / "tokenizer.json").is_file() or has_vocab_and_merges(folder))
        or Path(tokenizer.name_or_path).resolve() == folder.resolve()
    ):
        return
    ids = tokenizer.backend.get_vocab(with_added_tokens=True)
    trained_ids = Tokenizer.from_pretrained(folder).backend.get_vocab(with_added_tokens=True)
    if other := next((token for token, index in trained_ids.items() if ids.get(token) != index), None):
        raise ValueError(
            f"data.tokenizer differs from that of the model in {folder}, where {other!r} has the id {trained_ids[other]};"
            f" use --data.tokenizer {folder}"
        )
