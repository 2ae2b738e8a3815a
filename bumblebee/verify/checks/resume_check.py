"""Resume check: six steps without interruption, and three steps, a checkpoint and three more, give the same bytes.

Compares the checkpoints after the last step: weights, optimizer state and random state of each rank. The loss draws from every
random generator, the checkpoint is in the middle of an epoch, and stage and precision are the user's.

Two runs may agree on a mistake, so that two more things are counted: tensors of the checkpoint's model folder that are missing
or are not the optimizer's fp32 weights in the folder's dtype, and ranks whose random state is that of another rank, which would
drop the same activations.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file
from torch import Tensor

from bumblebee.checkpoint.sharded_state import WEIGHTS
from bumblebee.distributed import process_group
from bumblebee.optim import Cosine
from bumblebee.verify.check_result import CheckResult, Measurement
from bumblebee.verify.context import Context
from bumblebee.verify.training_run import NoisyLanguageModeling, RandomTokens, RunRecorder, run_training, saved_state

STEPS, INTERRUPT_AT, ACCUMULATE = 6, 3, 3
PARTS = {"weights": "model*.safetensors", "optimizer state": "*/optimizer-*", "random state": "*/random-*"}


def run(context: Context) -> CheckResult:
    """Count differing bytes; a note says if the machine does not even reproduce an uninterrupted run."""
    uninterrupted = _train(context, "uninterrupted", RunRecorder(save_at=STEPS))
    _train(context, "resumed", RunRecorder(save_at=INTERRUPT_AT, stop_at=INTERRUPT_AT))
    resumed = _train(context, "resumed", RunRecorder(save_at=STEPS), resume="auto")
    measurements = tuple(
        Measurement(f"differing bytes of {part}", differing_bytes(uninterrupted, resumed, part), 0.0) for part in PARTS
    )
    saved = (
        Measurement("wrong tensors of the model folder", wrong_tensors(uninterrupted), 0.0),
        Measurement("ranks with another rank's random state", shared_random_states(uninterrupted), 0.0),
    )
    if all(measurement.passed for measurement in measurements):
        return CheckResult(measurements + saved)
    repeated = _train(context, "repeated", RunRecorder(save_at=STEPS))
    if not any(differing_bytes(uninterrupted, repeated, part) for part in PARTS):
        return CheckResult(measurements + saved)
    return CheckResult(
        measurements + saved, "two uninterrupted runs differ as well: training is not deterministic on this machine"
    )


def differing_bytes(checkpoint: Path, other: Path, part: str) -> float:
    """Count differing bytes over all files of a part; a file that one checkpoint lacks counts as a whole."""
    names = {file.relative_to(folder) for folder in (checkpoint, other) for file in folder.glob(PARTS[part])}
    assert names, f"{checkpoint} has no {part}"
    return float(sum(_count_differences(checkpoint / name, other / name) for name in names))


def _count_differences(file: Path, other: Path) -> int:
    a, b = (numpy.frombuffer(path.read_bytes() if path.is_file() else b"", dtype=numpy.uint8) for path in (file, other))
    shorter = min(len(a), len(b))
    return int((a[:shorter] != b[:shorter]).sum()) + abs(len(a) - len(b))


def wrong_tensors(checkpoint: Path) -> float:
    """Count tensors of the model folder that are missing or differ from the fp32 weights of the training state."""
    weights = saved_state(checkpoint, WEIGHTS)
    tensors = {name: tensor for file in checkpoint.glob("model*.safetensors") for name, tensor in load_file(file).items()}
    different = (name for name in weights.keys() & tensors.keys() if not _is_cast(tensors[name], weights[name]))
    return float(len(weights.keys() ^ tensors.keys()) + sum(1 for _ in different))


def _is_cast(tensor: Tensor, weights: Tensor) -> bool:
    return torch.equal(tensor, weights.to(tensor.dtype))


def shared_random_states(checkpoint: Path) -> float:
    """Count ranks with the same state of torch's generator as an earlier rank."""
    files = sorted((checkpoint / "training_state").glob("random-*.safetensors"))
    states = {load_file(file)["torch"].numpy().tobytes() for file in files}
    return float(len(files) - len(states))


def _train(context: Context, name: str, recorder: RunRecorder, resume: str | None = None) -> Path:
    """Run up to ``STEPS`` steps and return the path of the last checkpoint."""
    data = RandomTokens(2 * ACCUMULATE * process_group.world_size() * 7 // 2)
    trainer = context.build_trainer(STEPS, ACCUMULATE, gradient_clip=0.5, resume=resume)
    # The fused one keeps its step counts on the device. In fp16 torch's loss scaler drives it in another way.
    fused = context.options.precision != "fp16"
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1, fused=fused)
    folder, schedule = context.folder / name, Cosine(warmup_steps=1)
    run_training(recorder, trainer, data, optimizer, folder, context.options.attention, schedule, NoisyLanguageModeling)
    return folder / f"checkpoint-{STEPS}"
