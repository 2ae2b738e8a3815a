"""The folder of caches that outlive a run, such as tokenized data."""

from __future__ import annotations

import os
from pathlib import Path


def resolve_cache_dir(cache_dir: str | Path | None = None) -> Path:
    """Return ``cache_dir`` if set, else $BUMBLEBEE_CACHE, else ~/.cache/bumblebee."""
    return Path(cache_dir or os.environ.get("BUMBLEBEE_CACHE") or Path.home() / ".cache" / "bumblebee")
