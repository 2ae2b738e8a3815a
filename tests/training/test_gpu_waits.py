"""How often a training step would wait for a GPU: operators that return values to the host, by the line that calls them."""

from __future__ import annotations

import traceback
from collections import Counter

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from helpers import training_runs
from helpers.training_runs import train
from torch.utils._python_dispatch import TorchDispatchMode

from bumblebee.callback import Callback
from bumblebee.nn import IGNORE_INDEX
from bumblebee.nn.documents import documents_of, move_with_documents
from bumblebee.nn.targets import move_with_targets, target_index

WAITING = {"_local_scalar_dense", "nonzero", "unique_consecutive", "bincount", "equal", "is_nonzero"}
ON_THE_HOST = {"count_targets", "to_device", "host_sum", "_check_window"}  # functions that compute on tensors of the host
ACCUMULATE = 3
OURS = {
    0: {"engine.py _clip_at_stage_0": 1},  # the gradient norm
    3: {"targets.py _find": ACCUMULATE},  # DeepSpeed hands modules copies of their positional arguments
}
# The gradient norm, overflow, and the optimizer's step counts, which are on the CPU.
ONCE_A_STEP = {
    "engine.py _take_model_step", "stage_1_and_2.py has_overflow", "utils.py is_invalid_grad_norm",
    "utils.py clip_tensors_by_global_norm", "stage_1_and_2.py _optimizer_step", "stage3.py step_with_gradscaler",
    "bf16_optimizer.py step",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Counts waits by the innermost line of bumblebee or DeepSpeed, as "file function"."""

    def __init__(self) -> None:
        super().__init__()
        self.by_place: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        masks = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if name in WAITING or any(mask is not None and mask.dtype == torch.bool for mask in masks):
            self.add()
        return func(*args, **(kwargs or {}))

    def add(self) -> None:
        """Count a wait of the current line."""
        frames = [
            frame for frame in traceback.extract_stack() if "/bumblebee/" in frame.filename or "/deepspeed/" in frame.filename
        ]
        if not any(frame.name in ON_THE_HOST for frame in frames):
            place = frames[-1]
            package = "deepspeed " if "/deepspeed/runtime" in place.filename else ""
            self.by_place[f"{package}{place.filename.rpartition('/')[2]} {place.name}"] += 1


class CountWaits(Callback):
    """Counts those of one step, from its beginning to the decision to stop or save."""

    def __init__(self, step: int) -> None:
        self.step, self.waits, self.is_counting = step, Waits(), False

    def on_step_start(self, trainer) -> None:
        if trainer.step == self.step:
            self.waits.__enter__()
            self.is_counting = True

    def on_save(self, trainer) -> None:
        if trainer.step == self.step + 1:
            self.waits.__exit__(None, None, None)
            self.is_counting = False


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_waits_for_the_gpu_in_a_step_are_the_known_ones(stage, tmp_path, monkeypatch):
    counter = CountWaits(step=2)
    monkeypatch.setattr(training_runs, "make_callback", lambda *args: counter)
    monkeypatch.setattr(get_accelerator().__class__, "synchronize", lambda *args: counter.is_counting and counter.waits.add())
    train(
        tmp_path / "run", zero_stage=stage, precision="bf16", max_steps=4, accumulate=ACCUMULATE, log_every=10,
        callbacks={"waits": ["CountWaits", {}]}, data={"samples": 24, "targets": (16, 5)},
    )  # fmt: skip
    ours, deepspeed = ({}, {})
    for place, count in counter.waits.by_place.items():
        (deepspeed if place.startswith("deepspeed ") else ours)[place.removeprefix("deepspeed ")] = count
    assert ours == OURS.get(stage, {})
    assert deepspeed.keys() <= ONCE_A_STEP  # nothing in a micro-batch, such as the timer of throughput


def test_inferred_targets_are_not_used_after_labels_changed():
    labels = move_with_targets(torch.tensor([[5, IGNORE_INDEX, 7]]), torch.device("cpu"))
    assert target_index(labels).tolist() == [0, 2]
    labels[0, 0] = IGNORE_INDEX
    assert target_index(labels).tolist() == [2]
    positions = move_with_documents(torch.arange(6)[None], torch.device("cpu"))
    assert documents_of(positions).one_per_row
    positions[0, 3:] -= 3
    assert documents_of(positions).cu_seqlens.tolist() == [0, 3, 6]
