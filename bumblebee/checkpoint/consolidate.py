"""Consolidation: from the pieces that the ranks of a run have saved to one model folder, or adapter folder with LoRA.

Nothing is gathered and no rank is needed: parameters are put together one at a time and written shard by shard, so the peak
memory is about one output shard and one parameter, however large the model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from bumblebee.adapter_folders import CONFIG, base_model_folder, is_adapter_folder
from bumblebee.checkpoint import adapters
from bumblebee.checkpoint.atomic import written_aside
from bumblebee.checkpoint.hf_folder import ModelFiles, files_in, is_model_folder
from bumblebee.checkpoint.sharded_state import PieceReader
from bumblebee.checkpoint.weight_files import stored_keys
from bumblebee.checkpoint.weight_mapping import places
from bumblebee.json_files import read_json
from bumblebee.training.run_folder import read_trainer_state

_KEPT = ("tokenizer.json", "tokenizer_config.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def consolidate(checkpoint: str | Path, output: str | Path, dtype: str = "auto", max_shard_size: str = "5GB") -> None:
    """Write a model folder from a checkpoint's training state.

    Args:
        checkpoint: a run's checkpoint-<step>, written by any number of ranks at any ZeRO stage.
        output: the model folder; may be the checkpoint itself.
        dtype: auto for the precision that was trained in, or float32, bfloat16, float16.
        max_shard_size: largest file, such as "5GB".

    Raises:
        ValueError: no checkpoint there, or an incomplete one, or an unknown dtype.
        OSError: the output cannot be written; it is then as it was.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    check_dtype(dtype)
    write = _write_adapter if is_adapter_folder(checkpoint) else _write_model
    write(checkpoint, output, dtype, max_shard_size)


def _write_model(checkpoint: Path, output: Path, dtype: str, max_shard_size: str) -> None:
    files = files_in(checkpoint)
    if dtype == "auto":
        dtype = read_json(checkpoint / "config.json")["torch_dtype"]
    with PieceReader(checkpoint / "training_state") as reader, written_aside(output) as aside:
        _check_whole(checkpoint, files, reader)
        files.write(aside, reader.weights(DTYPES[dtype]), max_shard_size)
        copy_files(_KEPT, checkpoint, aside)


def _check_whole(checkpoint: Path, files: ModelFiles, reader: PieceReader) -> None:
    """Refuse a training state that lacks what a model beside it has: frozen parameters."""
    if not is_model_folder(checkpoint):
        return
    ours = {**reader.shapes, **{name: buffer.shape for name, buffer in reader.buffers.items()}}
    lacking = stored_keys(checkpoint) - places(files.rules(), ours).keys()
    if lacking:
        raise ValueError(
            f"{checkpoint} was trained with {len(lacking)} tensors frozen, such as {min(lacking)}, which it lacks:"
            " the checkpoint is a model folder itself"
        )


def _write_adapter(checkpoint: Path, output: Path, dtype: str, max_shard_size: str) -> None:
    if dtype == "auto":
        dtype = read_trainer_state(checkpoint)["dtype"]
    rules = files_in(base_model_folder(checkpoint)).rules()
    with PieceReader(checkpoint / "training_state") as reader, written_aside(output) as aside:
        tensors = (pair for pair in reader.weights(DTYPES[dtype]) if adapters.is_adapter_key(pair[0]))  # no buffer of the base
        adapters.write_adapter_weights(aside, tensors, rules)
        copy_files((*_KEPT, CONFIG, "generation_config.json"), checkpoint, aside)


def check_dtype(dtype: str) -> None:
    """Refuse what is no name of a dtype.

    Raises:
        ValueError: it is unknown.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; write auto, {', '.join(DTYPES)}")


def copy_files(patterns: Iterable[str], source: Path, target: Path) -> None:
    """Copy those files of a folder that there are."""
    for file in (file for pattern in patterns for file in source.glob(pattern)):
        shutil.copyfile(file, target / file.name)
