"""A reference's log-probabilities, computed once before training and cached on disk; no reference model stays in memory.

A file's name is a hash of everything its numbers depend on: the reference's weights, the precision, and the tokens of all
pairs. The loss is not part of it, so runs with another beta or loss type share the file. Pairs are identified by the batches'
``index``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from bumblebee.checkpoint.adapters.folder import adapter_chain
from bumblebee.checkpoint.atomic import flush
from bumblebee.datamodule import Batch
from bumblebee.distributed import process_group
from bumblebee.nn import IGNORE_INDEX
from bumblebee.tasks.pair_log_probs import valid_pairs
from bumblebee.tasks.reference import Reference
from bumblebee.tasks.run_context import RunContext
from bumblebee.tasks.task import ForwardFn
from bumblebee.utils.cache_dir import resolve_cache_dir

FORMAT = 1  # increase it when a file's content changes for the same inputs
Columns = dict[str, Tensor]  # for each split "<split>/index" (N,), sorted, and "<split>/logps" (N, 2)
Row = TypeVar("Row", bound=tuple[int, object])
Splits = dict[str, Sequence[object]]  # "train" and "validation" -> samples


class CachedReference(Reference):
    """Looks up log-probabilities by the index of the pair.

    Args:
        columns: on the device.
    """

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    def __call__(self, model: ForwardFn, batch: Batch, split: str) -> Tensor:
        known, logps = self.columns[f"{split}/index"], self.columns[f"{split}/logps"]
        position = torch.searchsorted(known, batch["index"]).clamp_max(len(known) - 1)
        # A missing pair must not get another's numbers: NaN ends the run.
        return torch.where((known[position] == batch["index"])[:, None], logps[position], torch.nan)


def load_or_compute(
    open_reference: Callable[[], Reference], weights_digest: str, run: RunContext, cache_dir: str | Path | None
) -> CachedReference:
    """Return a reference's log-probabilities of all pairs, read from disk or computed now by all ranks. Collective.

    Args:
        open_reference: called if they must be computed; its result is closed afterwards.
        weights_digest: of the reference's weights.
        run: the run.
        cache_dir: the cache folder; None for $BUMBLEBEE_CACHE or ~/.cache/bumblebee.

    Raises:
        ValueError: two pairs have the same index.
    """
    splits: Splits = {"train": run.data.train, "validation": run.data.validation or ()}
    arithmetic = [run.precision, run.zero_stage == 0]  # at stage 0, half precision is autocast
    inputs = [FORMAT, weights_digest, arithmetic, *(_tokens_digest(run, samples) for samples in splits.values())]
    key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:20]
    file = resolve_cache_dir(cache_dir) / "reference" / f"{key}.safetensors"
    if process_group.any_rank(not file.is_file()):
        reference = open_reference()
        columns = _compute(reference, run, splits)
        reference.close()
        if process_group.local_rank() == 0:
            _write(file, columns)
    else:
        columns = load_file(file)
    return CachedReference({name: column.to(run.device) for name, column in columns.items()})


# -- computing -----------------------------------------------------------------------------------------------------------


def _compute(reference: Reference, run: RunContext, splits: Splits) -> Columns:
    columns: Columns = {}
    for split, samples in splits.items():
        rows: list[tuple[int, list[float]]] = []
        for batch in _batches(run, samples, f"reference, {split} pairs"):
            logps = reference(run.engine, run.to_device(batch), split).tolist()
            rows += [(index, logps[pair]) for pair, index in _numbered(batch)]
        rows = _gathered_by_index(rows)
        columns[f"{split}/index"] = torch.tensor([index for index, _ in rows], dtype=torch.int64)
        columns[f"{split}/logps"] = torch.tensor([logps for _, logps in rows], dtype=torch.float32).view(-1, 2)
    return columns


def _batches(run: RunContext, samples: Sequence[object], description: str) -> Iterable[Batch]:
    """This rank's share of the samples, with a progress bar."""
    total = -(-len(samples) // (run.micro_batch_size * process_group.world_size()))
    disable = None if run.is_main else True
    return tqdm(run.local_batches(samples), desc=description, total=total, unit=" batches", disable=disable, leave=False)


def _numbered(batch: Batch) -> list[tuple[int, int]]:
    """(position in the batch, index) of each valid pair; a rank's share may end in batches without any."""
    return [(pair, int(batch["index"][pair])) for pair in valid_pairs(batch).nonzero().flatten().tolist()]


def _gathered_by_index(rows: list[Row]) -> list[Row]:
    """The rows of all ranks, each of which starts with an index, sorted by it. Collective."""
    merged = sorted(process_group.all_gather_items(rows), key=lambda row: row[0])
    if len({row[0] for row in merged}) < len(merged):
        raise ValueError("data: two pairs have the same index; precompute_reference needs a unique index for each pair")
    return merged


def _write(file: Path, columns: Columns) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    save_file(columns, partial)
    flush(partial)
    os.replace(partial, file)


# -- digests -------------------------------------------------------------------------------------------------------------


def _tokens_digest(run: RunContext, samples: Sequence[object]) -> str:
    """Hash the tokens of all pairs, independent of batching and padding. Collective."""
    rows = [
        (index, _row_digest(batch, 2 * pair) + _row_digest(batch, 2 * pair + 1))
        for batch in _batches(run, samples, "reading pairs")
        for pair, index in _numbered(batch)
    ]
    return hashlib.sha256(json.dumps(_gathered_by_index(rows)).encode()).hexdigest()


def _row_digest(batch: Batch, row: int) -> str:
    """Hash everything that a response's log-probability depends on: the row up to its last target."""
    end = int((batch["labels"][row] != IGNORE_INDEX).nonzero().max()) + 1
    digest = hashlib.blake2b(digest_size=16)
    for name in ("input_ids", "labels", "position_ids"):
        digest.update(batch[name][row, :end].contiguous().numpy().tobytes())
    return digest.hexdigest()


def tensors_digest(tensors: Iterable[tuple[str, Tensor]], config: object) -> str:
    """Hash named weights, one at a time, and the model's config."""
    digest = hashlib.sha256(str(config).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def folder_digest(folder: str | Path) -> str:
    """Hash a model folder's config and weights; for an adapter folder, also those of its base model."""
    digest = hashlib.sha256()
    for part in map(Path, adapter_chain(folder)):
        for file in sorted([*part.glob("*config.json"), *part.glob("*.safetensors")]):
            digest.update(file.name.encode())
            with open(file, "rb") as content:
                while block := content.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
