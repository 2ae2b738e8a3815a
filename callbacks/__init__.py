"""Callbacks: what happens beside the training loop, one per file, named in a recipe as ``callbacks.Checkpoint``.

Classes are imported on first use, so that the command line does not pay for callbacks that a recipe does not name. The
package name is shared with a ``callbacks`` folder of the user's; see ``bumblebee/utils/shared_packages.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bumblebee.utils.shared_packages import extend_path, lazy_attributes

if TYPE_CHECKING:
    from callbacks.bigram_baseline import BigramBaseline
    from callbacks.checkpoint import Checkpoint
    from callbacks.consolidate import Consolidate
    from callbacks.early_stopping import EarlyStopping
    from callbacks.evaluate import Evaluate
    from callbacks.file_log import FileLog
    from callbacks.loss_plot import LossPlot
    from callbacks.metrics_history import MetricsHistory
    from callbacks.profiler import Profiler
    from callbacks.progress_bar import ProgressBar
    from callbacks.run_summary import RunSummary
    from callbacks.samples import Samples
    from callbacks.tensorboard import TensorBoard
    from callbacks.throughput import Throughput
    from callbacks.validation import Validation
    from callbacks.wandb import WandB

_HOME = {
    "BigramBaseline": "callbacks.bigram_baseline",
    "Checkpoint": "callbacks.checkpoint",
    "Consolidate": "callbacks.consolidate",
    "EarlyStopping": "callbacks.early_stopping",
    "Evaluate": "callbacks.evaluate",
    "FileLog": "callbacks.file_log",
    "LossPlot": "callbacks.loss_plot",
    "MetricsHistory": "callbacks.metrics_history",
    "Profiler": "callbacks.profiler",
    "ProgressBar": "callbacks.progress_bar",
    "RunSummary": "callbacks.run_summary",
    "Samples": "callbacks.samples",
    "TensorBoard": "callbacks.tensorboard",
    "Throughput": "callbacks.throughput",
    "Validation": "callbacks.validation",
    "WandB": "callbacks.wandb",
}

__all__ = [
    "BigramBaseline",
    "Checkpoint",
    "Consolidate",
    "EarlyStopping",
    "Evaluate",
    "FileLog",
    "LossPlot",
    "MetricsHistory",
    "Profiler",
    "ProgressBar",
    "RunSummary",
    "Samples",
    "TensorBoard",
    "Throughput",
    "Validation",
    "WandB",
]


__path__ = extend_path(__path__, __name__, _HOME)
__getattr__ = lazy_attributes(__name__, _HOME)
