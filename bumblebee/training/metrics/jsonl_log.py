"""JSON Lines files with a "step" in each entry, as written during training."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from bumblebee.utils.text_files import named_errors


def json_line(metrics: dict[str, float]) -> str:
    """Metrics as a line of JSON. NaN and infinity, which JSON lacks, become null."""
    values = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
    valid = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps(valid, allow_nan=False) + "\n"


def truncate_after(path: Path, step: int, last: Sequence[str] = ()) -> None:
    """Keep the lines up to ``step``, none for step 0: a resumed run logs the later ones again. Replaces the file atomically.

    Args:
        path: of the file; if there is none, nothing happens.
        step: of the last line to keep.
        last: the last lines up to ``step``; those that the file lacks, since they were truncated, are written again.

    Raises:
        OSError: the file cannot be written; names the file.
    """
    if not path.exists():
        return
    partial = path.with_name(f".{path.name}.partial")
    missing = list(last) if step else []
    with named_errors(partial), partial.open("w", encoding="utf-8") as stream:
        for line in _lines_up_to(path, step) if step else ():
            stream.write(line)
            if line in missing:
                missing.remove(line)
        stream.writelines(missing)
    os.replace(partial, path)


def _lines_up_to(path: Path, step: int) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                entry = json.loads(line)
            except ValueError:  # truncated when the run was killed
                continue
            if entry["step"] <= step:
                yield line.rstrip("\n") + "\n"
