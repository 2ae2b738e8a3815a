"""trainer_state.json of a training checkpoint: step, data position and callback state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TRAINER_STATE = "trainer_state.json"  # written last: a checkpoint with it is complete


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Read trainer_state.json of a checkpoint.

    Raises:
        ValueError: the folder is not a checkpoint.
    """
    try:
        return json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint} is not a checkpoint that can be resumed: {error}") from error
