"""Consolidation: from the pieces that the ranks of a run have saved to one model folder.

Nothing is gathered and no rank is needed: parameters are put together one at a time and written shard by shard, so the peak
memory is about one output shard and one parameter, however large the model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from bumblebee.checkpoint.atomic import written_aside
from bumblebee.checkpoint.folder import load_config, write_model
from bumblebee.checkpoint.pieces import PieceReader

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    if dtype != "auto" and dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; write auto, {', '.join(_DTYPES)}")
    config = load_config(checkpoint)
    if dtype == "auto":
        dtype = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["torch_dtype"]
    with PieceReader(checkpoint / "training_state") as reader, written_aside(output) as aside:
        write_model(aside, config, reader.weights(_DTYPES[dtype]), max_shard_size)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, aside / name)
