"""A reference's log-probabilities, computed once and kept on the disk: afterwards no reference is in memory.

A file is named by a hash of what its numbers follow from: the reference's weights, the arithmetic, the tokens of all pairs.
Nothing of the loss is in it, so that runs with another beta or loss share it. Pairs are told apart by the batches' ``index``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from bumblebee.adapter_folders import adapter_chain
from bumblebee.cache_dir import resolve_cache_dir
from bumblebee.checkpoint.atomic import flush
from bumblebee.datamodule import Batch
from bumblebee.distributed import process_group
from bumblebee.nn import IGNORE_INDEX
from bumblebee.tasks.pair_log_probs import trained_pairs
from bumblebee.tasks.reference import Reference
from bumblebee.training.loader import batches_in_order

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer

FORMAT = 1  # raised whenever a file's content changes for the same inputs
Columns = dict[str, Tensor]  # for each kind of samples "<samples>/index" (N,) in order and "<samples>/logps" (N, 2)


class Precomputed(Reference):
    """Looks the numbers up.

    Args:
        columns: on the device.
    """

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    def __call__(self, model: Any, batch: Batch, samples: str) -> Tensor:
        known, logps = self.columns[f"{samples}/index"], self.columns[f"{samples}/logps"]
        at = torch.searchsorted(known, batch["index"]).clamp_max(len(known) - 1)
        # A pair that is not there must not be taken for another: its loss is no number, which ends the run.
        return torch.where((known[at] == batch["index"])[:, None], logps[at], torch.nan)


def precomputed(
    open_reference: Callable[[], Reference], weights: str, trainer: Trainer, cache_dir: str | Path | None
) -> Precomputed:
    """A reference's numbers for all pairs, from the disk or computed now by all ranks. Collective.

    Args:
        open_reference: called where there is something to compute; what it gives is closed afterwards.
        weights: digest of the reference's weights.
        trainer: with engine and data.
        cache_dir: where files are kept; None for $BUMBLEBEE_CACHE or ~/.cache/bumblebee.

    Raises:
        ValueError: the data does not number its pairs.
    """
    kinds = {"train": trainer.data.train, "validation": trainer.data.validation or ()}
    arithmetic = [trainer.precision, trainer.zero_stage == 0]  # at stage 0 half precision is autocast
    named = [FORMAT, weights, arithmetic, *(_tokens_digest(trainer, samples) for samples in kinds.values())]
    key = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:20]
    file = resolve_cache_dir(cache_dir) / "reference" / f"{key}.safetensors"
    if process_group.any_rank(not file.is_file(), trainer.device):
        reference = open_reference()
        columns = _compute(reference, trainer, kinds)
        reference.close()
        if process_group.local_rank() == 0:
            _write(file, columns)
    else:
        columns = load_file(file)
    return Precomputed({name: column.to(trainer.device) for name, column in columns.items()})


# -- computing -----------------------------------------------------------------------------------------------------------


def _compute(reference: Reference, trainer: Trainer, kinds: dict[str, Sequence[Any]]) -> Columns:
    columns: Columns = {}
    for name, samples in kinds.items():
        rows: list[Any] = []
        for batch in _batches(trainer, samples, f"reference, {name} pairs"):
            logps = reference(trainer.engine, trainer.to_device(batch), name).tolist()
            rows += [(index, logps[pair]) for pair, index in _numbered(batch)]
        rows = _by_index(rows)
        columns[f"{name}/index"] = torch.tensor([index for index, _ in rows], dtype=torch.int64)
        columns[f"{name}/logps"] = torch.tensor([logps for _, logps in rows], dtype=torch.float32).view(-1, 2)
    return columns


def _batches(trainer: Trainer, samples: Sequence[Any], what: str) -> Iterable[Batch]:
    """This rank's share of samples, with a progress bar."""
    rank, ranks = process_group.rank(), process_group.world_size()
    batches = batches_in_order(trainer.data, samples, trainer.micro_batch_size, rank, ranks)
    total = -(-len(samples) // (trainer.micro_batch_size * ranks))
    return tqdm(batches, desc=what, total=total, unit=" batches", disable=None if trainer.is_main else True, leave=False)


def _numbered(batch: Batch) -> list[tuple[int, int]]:
    """(place in the batch, index) of each pair with targets; a rank's share may end in batches without any."""
    return [(pair, int(batch["index"][pair])) for pair in trained_pairs(batch).nonzero().flatten().tolist()]


def _by_index(rows: list[Any]) -> list[Any]:
    """All ranks' rows, each beginning with an index, in order. Collective."""
    merged = sorted(process_group.all_gather_items(rows))
    if len({row[0] for row in merged}) < len(merged):
        raise ValueError("data: two pairs have the same index: precompute_reference needs one for each pair")
    return merged


def _write(file: Path, columns: Columns) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}.partial")
    save_file(columns, aside)
    flush(aside)
    os.replace(aside, file)


# -- digests -------------------------------------------------------------------------------------------------------------


def _tokens_digest(trainer: Trainer, samples: Sequence[Any]) -> str:
    """Hash of all pairs, however they are batched and padded. Collective."""
    rows = [
        (index, _row_digest(batch, 2 * pair) + _row_digest(batch, 2 * pair + 1))
        for batch in _batches(trainer, samples, "reading pairs")
        for pair, index in _numbered(batch)
    ]
    return hashlib.sha256(json.dumps(_by_index(rows)).encode()).hexdigest()


def _row_digest(batch: Batch, row: int) -> str:
    """Hash of what a response's log-probability follows from: everything up to its last target."""
    end = int((batch["labels"][row] != IGNORE_INDEX).nonzero().max()) + 1
    digest = hashlib.blake2b(digest_size=16)
    for name in ("input_ids", "labels", "position_ids"):
        digest.update(batch[name][row, :end].contiguous().numpy().tobytes())
    return digest.hexdigest()


def tensors_digest(tensors: Iterable[tuple[str, Tensor]], config: Any) -> str:
    """Hash of named weights, one at a time, and of the config they belong to."""
    digest = hashlib.sha256(str(config).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def folder_digest(folder: str | Path) -> str:
    """Hash of a model folder's config and weights; of an adapter folder also of what it stands on."""
    digest = hashlib.sha256()
    for part in adapter_chain(folder):
        for file in sorted([*part.glob("*config.json"), *part.glob("*.safetensors")]):
            digest.update(file.name.encode())
            with open(file, "rb") as content:
                while block := content.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
