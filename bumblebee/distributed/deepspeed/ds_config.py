"""DeepSpeed's configuration: ours, with the user's merged in. Conflicts and unknown keys are named; DeepSpeed ignores them.

Nothing here imports deepspeed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # precisions whose arithmetic is not fp32
# What DeepSpeed reads and this loop can make use of.
_KEYS = (
    "aio", "bf16", "comms_logger", "communication_data_type", "data_types", "disable_allgather", "disable_python_gc",
    "dump_state", "flops_profiler", "fp16", "gradient_accumulation_steps", "gradient_clipping", "gradient_predivide_factor",
    "managed_gradient_accumulation", "memory_breakdown", "prescale_gradients", "steps_per_print", "timers", "torch_autocast",
    "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)  # fmt: skip
# What it reads too, and where the same is said here.
_ELSEWHERE = {
    "optimizer": "the recipe's optimizer decides",
    "scheduler": "the recipe's schedule decides",
    "train_batch_size": "it follows from trainer.micro_batch_size, trainer.accumulate and the number of ranks",
    "gradient_allreduce_op": "gradients are divided by the number of targets",
    "activation_checkpointing": "add bumblebee.transforms.ActivationCheckpointing to task.transforms",
    "compile": "add bumblebee.transforms.Compile to task.transforms",
    "tensorboard": "add callbacks.TensorBoard",
    "wandb": "add callbacks.WandB",
    "csv_monitor": "add callbacks.MetricsHistory",
    "checkpoint": "checkpoints are callbacks.Checkpoint's",
}


@dataclass(frozen=True)
class EngineOptions:
    """What decides how DeepSpeed runs.

    Args:
        precision: "fp32", "bf16" or "fp16".
        zero_stage: 0 to 3 (arXiv 1910.02054).
        micro_batch_size: samples in a micro-batch.
        gradient_clip: largest norm of a step's gradient, or None.
        overrides: more DeepSpeed configuration, merged into ours.
        hidden_size: of the model, which the sizes of stage 3's buckets follow from; None leaves DeepSpeed's.
    """

    precision: str
    zero_stage: int
    micro_batch_size: int
    gradient_clip: float | None
    overrides: dict[str, Any]
    hidden_size: int | None = None

    @property
    def half(self) -> torch.dtype | None:
        """The dtype of the arithmetic where it is not fp32."""
        return HALF.get(self.precision)

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype of the weights: at stage 0 they are fp32 and the arithmetic runs under autocast."""
        return self.half if self.half is not None and self.zero_stage > 0 else torch.float32


def deepspeed_config(options: EngineOptions) -> dict[str, Any]:
    """The configuration handed to DeepSpeed: ours, with the user's merged in.

    Raises:
        ValueError: the user's gives another value for something that the trainer's options decide; it is named.
    """
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": options.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": options.gradient_clip or float("inf"),  # at infinity only the norm is measured
        # Memory-efficient linear would replace torch's linear function in the whole process.
        "zero_optimization": {"stage": options.zero_stage, "memory_efficient_linear": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # with offload, the recipe's own optimizer: DeepSpeed's would be compiled first
        "steps_per_print": 2**62,
    }
    if options.half and options.zero_stage == 0:
        ours["torch_autocast"] = {"enabled": True, "dtype": str(options.half).removeprefix("torch.")}
    elif options.half:
        ours[options.precision] = {"enabled": True}
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    theirs = _without_auto(options.overrides)
    _check_keys(theirs)
    merged = _merged(ours, theirs, "trainer.deepspeed")
    _check_offload(merged["zero_optimization"])
    if options.zero_stage == 3 and options.hidden_size:
        merged["zero_optimization"] = {**stage_3_buckets(options.hidden_size), **merged["zero_optimization"]}
    return merged


def stage_3_buckets(hidden_size: int) -> dict[str, int]:
    """Elements moved at a time, from the hidden size: a bucket then holds about one matrix of a block."""
    return {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": hidden_size**2 * 9 // 10,
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }


def on_nvme(config: dict[str, Any]) -> bool:
    """Whether something is kept on NVMe, which takes DeepSpeed's operator for asynchronous reading and writing."""
    settings = config["zero_optimization"].values()
    return any(isinstance(value, dict) and value.get("device") == "nvme" for value in settings)


def _without_auto(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration made for Hugging Face's Trainer says "auto" where the trainer decides, as ours does anyway."""
    kept = {key: _without_auto(value) if isinstance(value, Mapping) else value for key, value in theirs.items()}
    return {key: value for key, value in kept.items() if value != "auto"}


def _check_keys(theirs: dict[str, Any]) -> None:
    for key in theirs:
        if key in _ELSEWHERE:
            raise ValueError(f"trainer.deepspeed.{key}: {_ELSEWHERE[key]}; drop it")
        if key not in _KEYS:
            near = get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it may hold {', '.join(_KEYS)}"
            raise ValueError(f"trainer.deepspeed: {key!r} is not supported; {hint}")


def _check_offload(zero: dict[str, Any]) -> None:
    for name in ("offload_optimizer", "offload_param"):
        device = zero.get(name, {}).get("device")
        if device == "nvme" and zero["stage"] != 3:
            raise ValueError(f"trainer.deepspeed.zero_optimization.{name}.device: nvme needs trainer.zero_stage 3")
        if device == "nvme" and not zero[name].get("nvme_path"):
            raise ValueError(f"trainer.deepspeed.zero_optimization.{name}.nvme_path is missing: a folder on the NVMe disk")


def _merged(ours: dict[str, Any], theirs: dict[str, Any], where: str) -> dict[str, Any]:
    result = dict(ours)
    for key, value in theirs.items():
        if isinstance(value, dict) and isinstance(ours.get(key, {}), dict):
            result[key] = _merged(ours.get(key, {}), value, f"{where}.{key}")
        elif key in ours and ours[key] != value:
            raise ValueError(f"{where}.{key} is {value!r}, but the trainer's own options make it {ours[key]!r}: drop it")
        else:
            result[key] = value
    return result


def read_overrides(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """``trainer.deepspeed``: nothing, a dict, or the path of a JSON file.

    Raises:
        ValueError: no such file, or no JSON object in it.
    """
    if value is None or isinstance(value, dict):
        return _nested(value or {})
    try:
        content = json.loads(Path(value).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"trainer.deepspeed: cannot read {value}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"trainer.deepspeed: {value} holds no JSON object")
    return content


def _nested(options: dict[str, Any]) -> dict[str, Any]:
    """What the command line makes of ``--trainer.deepspeed.a.b 2``, which is {"a.b": "2"}, as {"a": {"b": 2}}."""
    result: dict[str, Any] = {}
    for key, value in options.items():
        *parents, last = key.split(".")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        if isinstance(value, dict):
            place[last] = {**place.get(last, {}), **_nested(value)}
        else:
            place[last] = _from_text(value) if isinstance(value, str) else value
    return result


def _from_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
