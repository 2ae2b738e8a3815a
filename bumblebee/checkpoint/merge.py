"""Merging: from an adapter folder and the model below it to one model folder.

Weights are read, summed in fp32, cast once and written one at a time, so the peak memory is about one output shard and one
tensor. peft is not needed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from bumblebee.adapter_folders import CONFIG, adapter_chain, is_adapter_folder
from bumblebee.checkpoint.atomic import written_aside
from bumblebee.checkpoint.consolidate import DTYPES, check_dtype, copy_files
from bumblebee.checkpoint.hf_folder import drop_other_weights, files_in, is_model_folder, read_tensors

_TOKENIZER = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")


def merge(
    adapter: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write the model folder that an adapter and its base model are together; tokenizer and stop ids are the adapter's.

    Args:
        adapter: an adapter folder.
        output: the model folder.
        base: what the adapter stands on, instead of the folder that it names.
        dtype: auto for the base model's, or float32, bfloat16, float16.
        max_shard_size: largest file, such as "5GB".
        overwrite: replace a model that is in output.

    Raises:
        ValueError: no adapter there, no base or another model's, an unknown dtype, or an output that is taken.
        OSError: the output cannot be written; it is then as it was.
    """
    adapter, output = Path(adapter), Path(output)
    check_dtype(dtype)
    if not is_adapter_folder(adapter):
        raise ValueError(f"adapter: {adapter} is no adapter folder: {CONFIG} is not there, or a whole model is beside it")
    folders = adapter_chain(adapter, base)
    _check_output(output, folders, overwrite)
    files = files_in(folders[0])
    tensors = tqdm(
        read_tensors(adapter, DTYPES.get(dtype), base), desc="merging", unit=" tensors", disable=not sys.stderr.isatty()
    )
    with written_aside(output) as aside:
        names = files.write_stored(aside, tensors, max_shard_size)
        copy_files(_TOKENIZER, _last_with("tokenizer.json", folders), aside)
        copy_files(["generation_config.json"], _last_with("generation_config.json", folders), aside)
    drop_other_weights(output, names)


def _check_output(output: Path, folders: list[Path], overwrite: bool) -> None:
    if (output / CONFIG).exists() or output.resolve() in [folder.resolve() for folder in folders]:
        raise ValueError(f"output: {output} holds an adapter or the base model: choose another folder")
    if is_model_folder(output) and not overwrite:
        raise ValueError(f"output: {output} already holds a model: add --overwrite to replace it")


def _last_with(name: str, folders: list[Path]) -> Path:
    return next((folder for folder in reversed(folders) if (folder / name).is_file()), folders[-1])
