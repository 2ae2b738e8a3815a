"""Measure the peak memory of consolidation for a model larger than an output shard.

    python benchmarks/consolidate.py

Consolidates a checkpoint of 0.4 G parameters from four ranks into shards of 250 MB. Takes about a minute.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import header, parser, peak_memory, run_in_subprocess, table

SHARD_MB, RANKS = 250, 4


def make_checkpoint(folder: Path) -> int:
    """Write a checkpoint without Adam's moments, which consolidation does not read; returns its bytes."""
    import torch

    from bumblebee import Bumblebee, BumblebeeConfig
    from bumblebee.checkpoint.model_files import ModelFiles
    from bumblebee.checkpoint.sharded_state import SavedShard, write_shards

    config = BumblebeeConfig.preset("0.5b", num_hidden_layers=18)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Bumblebee(config).named_parameters()}
    (folder / "training_state").mkdir(parents=True)
    ModelFiles(config).write_configs(folder, "bfloat16")
    for rank in range(RANKS):
        shards = []
        for name, shape in shapes.items():
            size = -(-torch.Size(shape).numel() // RANKS)
            start = rank * size
            numel = min(size, torch.Size(shape).numel() - start)
            if numel > 0:
                shards.append(SavedShard(name, shape, start, numel, {"fp32": torch.randn(numel)}))
        write_shards(folder / "training_state", f"optimizer-{rank:05d}-of-{RANKS:05d}", shards)
    return sum(file.stat().st_size for file in (folder / "training_state").iterdir())


def measure(folder: str, output: str) -> None:
    """In a process of its own: print the peak memory above the start."""
    from bumblebee.checkpoint import consolidate

    before = peak_memory()
    consolidate.consolidate(folder, output, max_shard_size=f"{SHARD_MB}MB")
    print(peak_memory() - before)


def main() -> None:
    print(header("Peak memory of consolidation"))
    with tempfile.TemporaryDirectory() as folder:
        size = make_checkpoint(Path(folder) / "checkpoint")
        (peak,) = run_in_subprocess(__file__, "--measure", f"{folder}/checkpoint", f"{folder}/out")
        shards = sorted(file.stat().st_size for file in (Path(folder) / "out").glob("*.safetensors"))
    largest = 151_936 * 896 * 4
    rows = [
        ["fp32 weights of the checkpoint", f"{size / 1e9:.2f} GB"],
        ["output, bf16", f"{sum(shards) / 1e9:.2f} GB in {len(shards)} shards"],
        ["largest output shard", f"{shards[-1] / 1e9:.2f} GB"],
        ["largest tensor, fp32", f"{largest / 1e9:.2f} GB"],
        ["peak memory above the start", f"{peak:.2f} GB"],
    ]
    print(table(["", "size"], rows))


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--measure", nargs=2, metavar=("CHECKPOINT", "OUTPUT"), help="used by the script itself")
    options = arguments.parse_args()
    if options.measure:
        measure(*options.measure)
    else:
        main()
