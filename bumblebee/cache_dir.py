"""Where things are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def resolve_cache_dir(cache_dir: str | Path | None = None) -> Path:
    """The folder that was asked for, else $BUMBLEBEE_CACHE, else ~/.cache/bumblebee."""
    return Path(cache_dir or os.environ.get("BUMBLEBEE_CACHE") or Path.home() / ".cache" / "bumblebee")
