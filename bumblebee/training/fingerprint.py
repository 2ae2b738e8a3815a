"""What a run was, for comparing it with the run that resumes one of its checkpoints.

A checkpoint's training state has a meaning only for the same data in the same order, the same model and the same optimizer:
weights of other head counts have the same shapes, and Adam's state fits AdamW. So trainer_state.json holds a fingerprint of
these. Options that a run may change when it is resumed are not part of it: learning rates and other hyperparameters, batch
sizes, precision, ZeRO stage and ranks, the number of steps, callbacks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from bumblebee.checkpoint.digests import remembered_digest
from bumblebee.checkpoint.model_files import files_of
from bumblebee.checkpoint.weight_files import chain_weight_files
from bumblebee.datamodule import DataModule
from bumblebee.distributed import process_group
from bumblebee.tasks.task import Task
from bumblebee.utils.cache_dir import resolve_cache_dir
from bumblebee.utils.json_files import JSON

Fingerprint = dict[str, dict[str, JSON]]  # section -> name -> value

_RESTORE = {
    "data": "use the data of that run",
    "model": "set it back",
    "optimizer": "set it back",
    "weights": "restore that file",
}
_DATA = {  # names in ``TokenDataModule.fingerprint``: what determines them
    "records": "data.files: the same records in the same order, weights and held-out samples",
    "tokens": "data.tokenizer, chat_template, system and train_on",
    "samples": "data.max_length, packing and too_long",
}


def data_fingerprint(data: DataModule) -> Fingerprint:
    """The fingerprint of the training samples; empty for a DataModule that does not have one."""
    return {"data": dict(data.fingerprint())}


def model_fingerprint(task: Task) -> Fingerprint:
    """The fingerprint of the model, and the digests of the weight files that training only reads. Collective."""
    return {"model": files_of(task.model).fingerprint(), "weights": dict(_weight_digests(task))}


def optimizer_fingerprint(algorithm: str) -> Fingerprint:
    """The fingerprint of the optimizer."""
    return {"optimizer": {"optimizer": algorithm}}


def check_fingerprint(checkpoint: Path, saved: Mapping[str, Mapping[str, JSON]], current: Fingerprint) -> None:
    """Check that a run is the one that wrote a checkpoint, in the sections of ``current``.

    Names that only one of them has are not compared: they belong to another version.

    Raises:
        ValueError: names what differs first, both values, and what to do.
    """
    for section, values in current.items():
        before = saved.get(section, {})
        for name, value in values.items():
            if name in before and before[name] != json.loads(json.dumps(value)):
                raise ValueError(_mismatch(checkpoint, section, name, before[name], value))


def _mismatch(checkpoint: Path, section: str, name: str, before: JSON, value: JSON) -> str:
    label, restore = name, _RESTORE[section]
    if section == "data":
        label, restore = f"data whose {name} have the digest", f"{restore} ({_DATA.get(name, name)})"
    elif section == "weights":
        label = f"{name} of SHA-256"
    return (
        f"trainer.resume: {checkpoint} was trained with {label} {_short(before)}, this run has {_short(value)}: {restore}, or"
        f" start a new run from its weights, as recipes/continue_pretrain.yaml does, with task.model.folder {checkpoint}"
    )


def _short(value: JSON) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}..." if len(text) == 64 and value is text else text


# -- weights ---------------------------------------------------------------------------------------------------------------


def _weight_digests(task: Task) -> dict[str, str]:
    """The SHA-256 of each file of weights that no checkpoint restores, by role and name. Collective.

    The ranks of a machine divide the files between them, and the digests of large ones are remembered.
    """
    files = {
        f"{role} {name}": file for role, folder in _fixed_folders(task).items() for name, file in chain_weight_files(folder)
    }
    own = process_group.share_of_machine(sorted(files))
    memory = resolve_cache_dir() / "digests"
    return dict(process_group.all_gather_items([(name, remembered_digest(files[name], memory)) for name in own]))


def _fixed_folders(task: Task) -> dict[str, Path]:
    folders = dict(task.fixed_folders())
    if (source := _source_of_frozen(task.model)) is not None:
        folders["base model's"] = source
    return folders


def _source_of_frozen(model: nn.Module) -> Path | None:
    """The folder of a model with frozen parameters; None for others, whose weights a checkpoint restores."""
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    return getattr(model, "source", None) if frozen else None
