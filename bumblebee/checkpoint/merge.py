"""Merging: write the model folder that an adapter folder and its base model add up to.

Weights are read, merged in fp32, cast once and written one at a time, so peak memory is about one output shard and one tensor.
peft is not needed.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from bumblebee.checkpoint.adapters.folder import CONFIG, adapter_chain, is_adapter_folder, is_reward_model
from bumblebee.checkpoint.atomic import written_aside
from bumblebee.checkpoint.consolidate import DTYPES, check_dtype, copy_files
from bumblebee.checkpoint.digests import write_digests
from bumblebee.checkpoint.hf_folder import SPECIAL_IDS, is_model_folder, load_config
from bumblebee.checkpoint.integrity import check_intact, weight_damage
from bumblebee.checkpoint.model_files import ModelFiles, files_of_folder
from bumblebee.checkpoint.weight_reader import read_tensors
from bumblebee.checkpoint.weight_writer import remove_stale_weights
from bumblebee.utils.json_files import read_json

_TOKENIZER = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")


def merge(
    adapter: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Merge an adapter into its base model; tokenizer and generation_config.json are the adapter's.

    Args:
        adapter: adapter folder.
        output: model folder to write.
        base: base model, instead of the one that the adapter's config names.
        dtype: auto for the base model's, or float32, bfloat16, float16.
        max_shard_size: maximum size of a safetensors file, such as "5GB".
        overwrite: replace an existing model in ``output``.

    Raises:
        ValueError: not an adapter folder, a missing or different base model, damaged weights, an unknown dtype, or an output
            that exists.
        OSError: the output cannot be written; an existing folder then stays unchanged.
    """
    adapter, output = Path(adapter), Path(output)
    check_dtype(dtype)
    if not is_adapter_folder(adapter):
        raise ValueError(f"adapter: {_missing_part(adapter)}")
    folders = adapter_chain(adapter, base)
    _check_output(output, folders, overwrite)
    for folder in folders:
        check_intact(folder, weight_damage)
    files = _reward_model_files(adapter, folders[0]) if is_reward_model(adapter, base) else files_of_folder(folders[0])
    tensors = tqdm(
        read_tensors(adapter, DTYPES.get(dtype), base), desc="merging", unit=" tensors", disable=not sys.stderr.isatty()
    )
    with written_aside(output) as aside:
        digests = files.write_file_tensors(aside, tensors, max_shard_size)
        copy_files(_TOKENIZER, _last_with(("tokenizer.json", "vocab.json"), folders), aside)
        copy_files(["generation_config.json"], _last_with(("generation_config.json",), folders), aside)
        write_digests(aside, digests)
    remove_stale_weights(output, digests)


def _reward_model_files(adapter: Path, base: Path) -> ModelFiles:
    """The files of a reward model, with the adapter's special ids: its padding is not a token that ends answers."""
    generation = adapter / "generation_config.json"
    ids = {name: value for name, value in read_json(generation).items() if name in SPECIAL_IDS} if generation.is_file() else {}
    return ModelFiles(replace(load_config(base), score_head=True, **ids))


def _missing_part(folder: Path) -> str:
    if not folder.is_dir():
        return f"folder not found: {folder}"
    problem = "it contains a complete model" if (folder / CONFIG).is_file() else f"{CONFIG} not found"
    return f"{folder} is not an adapter folder: {problem}"


def _check_output(output: Path, folders: list[Path], overwrite: bool) -> None:
    if (output / CONFIG).exists() or output.resolve() in [folder.resolve() for folder in folders]:
        raise ValueError(f"output: {output} contains an adapter or the base model: choose another folder")
    if is_model_folder(output) and not overwrite:
        raise ValueError(f"output: {output} already contains a model: add --overwrite to replace it")


def _last_with(names: tuple[str, ...], folders: list[Path]) -> Path:
    """The last folder that has one of several files."""
    return next((folder for folder in reversed(folders) if any((folder / name).is_file() for name in names)), folders[-1])
