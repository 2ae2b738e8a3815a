"""How a part of the GPU benchmark reports: lines of JSON on its standard output, which the runner appends to the records."""

from __future__ import annotations

import json
import math
import sys
from typing import NoReturn

RESULT, SKIPPED = "RESULT ", "SKIPPED "


def report(**figures: object) -> None:
    """Print one result. NaN and infinity become null: JSON has neither."""
    finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in figures.items()}
    print(RESULT + json.dumps(finite, default=str), flush=True)


def skip(reason: str) -> NoReturn:
    """End the part: it cannot run here."""
    print(SKIPPED + reason, flush=True)
    sys.exit(0)
