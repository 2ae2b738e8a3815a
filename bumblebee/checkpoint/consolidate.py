"""Consolidation: convert the sharded training state of a checkpoint to a model folder, or with LoRA to an adapter folder.

Runs on the CPU without ranks. Parameters are assembled one at a time and written shard by shard, so peak memory is about one
output shard and one parameter, whatever the size of the model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from bumblebee.checkpoint.adapters.folder import CONFIG, base_model_folder, is_adapter_folder
from bumblebee.checkpoint.adapters.writer import is_adapter_key, write_adapter_weights
from bumblebee.checkpoint.atomic import written_aside
from bumblebee.checkpoint.digests import write_digests
from bumblebee.checkpoint.hf_folder import is_model_folder
from bumblebee.checkpoint.integrity import check_intact, state_damage
from bumblebee.checkpoint.model_files import ModelFiles, files_of_folder
from bumblebee.checkpoint.sharded_state import ShardReader
from bumblebee.checkpoint.trainer_state import TRAINING_STATE, checkpoints, read_trainer_state
from bumblebee.checkpoint.weight_files import stored_keys
from bumblebee.checkpoint.weight_mapping import slices_by_file_key
from bumblebee.utils.json_files import read_json

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def consolidate(
    checkpoint: str | Path,
    output: str | Path,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    verify: bool = True,
) -> None:
    """Write a model folder from a checkpoint's training state.

    Args:
        checkpoint: checkpoint-<step> of a run, written by any number of ranks at any ZeRO stage.
        output: model folder to write; may be the checkpoint itself.
        dtype: auto for the training precision, or float32, bfloat16, float16.
        max_shard_size: maximum size of a safetensors file, such as "5GB".
        verify: compare the training state with its digests first.

    Raises:
        ValueError: the checkpoint does not exist, is incomplete or damaged, or the dtype is unknown.
        OSError: the output cannot be written; an existing folder then stays unchanged.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    check_dtype(dtype)
    if newest := checkpoints(checkpoint)[-1:]:
        raise ValueError(f"checkpoint: {checkpoint} is a run, not a checkpoint: its newest checkpoint is {newest[0].path}")
    if verify:
        check_intact(checkpoint, state_damage)
    write = _write_adapter if is_adapter_folder(checkpoint) else _write_model
    write(checkpoint, output, dtype, max_shard_size)


def _write_model(checkpoint: Path, output: Path, dtype: str, max_shard_size: str) -> None:
    files = files_of_folder(checkpoint)
    if dtype == "auto":
        dtype = read_json(checkpoint / "config.json")["torch_dtype"]
    with ShardReader(checkpoint / TRAINING_STATE) as reader, written_aside(output) as aside:
        _check_complete(checkpoint, files, reader)
        digests = files.write(aside, reader.weights(DTYPES[dtype]), max_shard_size)
        copy_files(_TOKENIZER, checkpoint, aside)
        write_digests(aside, digests)


def _check_complete(checkpoint: Path, files: ModelFiles, reader: ShardReader) -> None:
    """Raise if the training state lacks tensors of the model saved with it: frozen parameters are not in the state."""
    if not is_model_folder(checkpoint):
        return
    shapes = {**reader.shapes, **{name: buffer.shape for name, buffer in reader.buffers.items()}}
    shapes |= {alias: shapes[name] for name, aliases in reader.aliases.items() for alias in aliases}
    frozen = stored_keys(checkpoint) - slices_by_file_key(files.rules(), shapes).keys()
    if frozen:
        raise ValueError(
            f"{checkpoint} was trained with {len(frozen)} tensors frozen, such as {min(frozen)}, which the training state does"
            " not contain: use the checkpoint itself, which is a model folder"
        )


def _write_adapter(checkpoint: Path, output: Path, dtype: str, max_shard_size: str) -> None:
    if dtype == "auto":
        dtype = read_trainer_state(checkpoint)["dtype"]
    rules = files_of_folder(base_model_folder(checkpoint)).rules()
    with ShardReader(checkpoint / TRAINING_STATE) as reader, written_aside(output) as aside:
        weights = reader.weights(DTYPES[dtype])
        updates = ((name, tensor) for name, tensor in weights if is_adapter_key(name))  # excludes the base model's buffers
        digests = write_adapter_weights(aside, updates, rules)
        copy_files((*_TOKENIZER, CONFIG, "generation_config.json"), checkpoint, aside)
        write_digests(aside, digests)


def check_dtype(dtype: str) -> None:
    """Check the name of a dtype.

    Raises:
        ValueError: it is neither auto nor a supported dtype.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; expected auto, {', '.join(DTYPES)}")


def copy_files(patterns: Iterable[str], source: Path, target: Path) -> None:
    """Copy the files of a folder that match any of the patterns."""
    for file in (file for pattern in patterns for file in source.glob(pattern)):
        shutil.copyfile(file, target / file.name)
