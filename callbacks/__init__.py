"""What can happen beside the training loop: one callback per file, named in a recipe as ``callbacks.Checkpoint``.

The names are imported on first use, so that the command line does not pay for callbacks that a recipe does not name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from callbacks.bigram_baseline import BigramBaseline
    from callbacks.checkpoint import Checkpoint
    from callbacks.consolidate import Consolidate
    from callbacks.file_log import FileLog
    from callbacks.loss_plot import LossPlot
    from callbacks.metrics_history import MetricsHistory
    from callbacks.progress_bar import ProgressBar
    from callbacks.run_summary import RunSummary
    from callbacks.tensorboard import TensorBoard
    from callbacks.validation import Validation

_HOME = {
    "BigramBaseline": "callbacks.bigram_baseline",
    "Checkpoint": "callbacks.checkpoint",
    "Consolidate": "callbacks.consolidate",
    "FileLog": "callbacks.file_log",
    "LossPlot": "callbacks.loss_plot",
    "MetricsHistory": "callbacks.metrics_history",
    "ProgressBar": "callbacks.progress_bar",
    "RunSummary": "callbacks.run_summary",
    "TensorBoard": "callbacks.tensorboard",
    "Validation": "callbacks.validation",
}

__all__ = [
    "BigramBaseline",
    "Checkpoint",
    "Consolidate",
    "FileLog",
    "LossPlot",
    "MetricsHistory",
    "ProgressBar",
    "RunSummary",
    "TensorBoard",
    "Validation",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'callbacks' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
