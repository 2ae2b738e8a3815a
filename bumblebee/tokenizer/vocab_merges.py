"""Reads a byte-level BPE that is given as vocab.json and merges.txt, as older model folders have it, instead of tokenizer.json.

The two files say nothing about how text is split before the merges. That depends on the tokenizer's class, which
tokenizer_config.json or config.json names: Qwen2's pattern after NFC normalization, or GPT-2's for every other class.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from bumblebee.tokenizer.template_sources import token_content
from bumblebee.utils.json_files import read_json

VOCAB, MERGES = "vocab.json", "merges.txt"
# Where text is split before BPE merges: Qwen2's pattern, which also Qwen2.5 and Qwen3 use.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT = "<|endoftext|>"  # of both GPT-2 and Qwen2, where no file names another
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def has_vocab_and_merges(folder: Path) -> bool:
    """Whether a folder has both files."""
    return (folder / VOCAB).is_file() and (folder / MERGES).is_file()


def read_vocab_and_merges(folder: Path, settings: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Convert the files of a folder.

    Args:
        folder: with vocab.json and merges.txt, and optionally special_tokens_map.json and added_tokens.json.
        settings: content of tokenizer_config.json.

    Returns:
        The library's tokenizer, and the settings with the special tokens that other files name.

    Raises:
        ValueError: a file is damaged, the vocabulary is not a byte-level BPE, or an added token cannot have its id.
    """
    backend = tokenizers.Tokenizer(_read_model(folder))
    settings = _with_named_tokens(folder, settings, backend)
    add_prefix_space = bool(settings.get("add_prefix_space", False))
    if _is_qwen(folder, settings):
        split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
        blanks = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)
        backend.normalizer, backend.pre_tokenizer = normalizers.NFC(), pre_tokenizers.Sequence([split, blanks])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, folder, settings)
    bos = token_content(settings.get("bos_token"))
    if settings.get("add_bos_token") and bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return backend, settings


def _read_model(folder: Path) -> models.BPE:
    try:
        model = models.BPE.from_file(str(folder / VOCAB), str(folder / MERGES))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{folder / VOCAB} and {MERGES}: {error}") from error
    if missing := [byte for byte in pre_tokenizers.ByteLevel.alphabet() if model.token_to_id(byte) is None]:
        reason = f"not a byte-level BPE, {len(missing)} of 256 bytes are missing"
        raise ValueError(f"{folder / VOCAB}: {reason}; save a tokenizer.json with transformers' AutoTokenizer")
    return model


def _is_qwen(folder: Path, settings: Mapping[str, Any]) -> bool:
    name = settings.get("tokenizer_class")
    if name is None and (folder / "config.json").is_file():
        name = read_json(folder / "config.json").get("model_type")
    return str(name).lower().startswith("qwen")


def _with_named_tokens(folder: Path, settings: Mapping[str, Any], backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """The settings with eos_token and so on from special_tokens_map.json, or with the default end-of-text token."""
    file = folder / "special_tokens_map.json"
    merged = {**(read_json(file) if file.is_file() else {}), **settings}
    if "eos_token" not in merged and backend.token_to_id(END_OF_TEXT) is not None:
        merged["eos_token"] = END_OF_TEXT
    return merged


def _add_tokens(backend: tokenizers.Tokenizer, folder: Path, settings: Mapping[str, Any]) -> None:
    """Add the tokens that are not in vocab.json, in the order of their ids, and make the named ones special."""
    named = [token_content(value) for key, value in settings.items() if key.endswith("_token")]
    named += map(token_content, settings.get("additional_special_tokens") or [])
    for id, token in sorted(_added_tokens(folder, settings, named).items()):
        backend.add_tokens([token])
        if (actual := backend.token_to_id(token.content)) != id:
            raise ValueError(f"{folder}: the added token {token.content!r} has the id {id}, but {actual} is the next free one")
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for content in dict.fromkeys(named):
        if content is not None and content not in known:
            backend.add_special_tokens([AddedToken(content, special=True, normalized=False)])


def _added_tokens(folder: Path, settings: Mapping[str, Any], named: list[str | None]) -> dict[int, AddedToken]:
    """Tokens by id, from tokenizer_config.json or, in older folders, added_tokens.json."""
    if decoder := settings.get("added_tokens_decoder"):
        flags = {int(id): {key: token[key] for key in _FLAGS if key in token} for id, token in decoder.items()}
        return {int(id): AddedToken(token["content"], **flags[int(id)]) for id, token in decoder.items()}
    file = folder / "added_tokens.json"
    ids: dict[str, int] = read_json(file) if file.is_file() else {}
    return {id: AddedToken(content, special=content in named, normalized=False) for content, id in ids.items()}
