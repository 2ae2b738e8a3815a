"""Run the jobs of ``FOLDER/jobs.json`` one after the other on all ranks, and write ``FOLDER/results.json``.

Starting two ranks takes seconds and a small run takes tenths of a second, so tests start many runs together.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from bumblebee.distributed import process_group
from helpers.training_runs import run


def main(folder: Path) -> None:
    """Run all jobs; the result of a refused run is {"error": its message}."""
    results = []
    for number, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        # The launcher's store works for one process group only, and each run destroys its group: use a store per run.
        store = dist.FileStore(str(folder / f"store-{number}"), process_group.world_size())
        dist.init_process_group("gloo", store=store, rank=process_group.rank(), world_size=process_group.world_size())
        results.append(run(job))
    if process_group.is_main():
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
