"""DeepSpeed's configuration: ours with the user's merged in.

Conflicts and unknown keys raise an error that names them; DeepSpeed itself would ignore them. Does not import deepspeed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from bumblebee.distributed.deepspeed.ds_checks import check_supported

DsConfig = dict[str, Any]  # a JSON object
HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# The keys of DeepSpeed's configuration that work with this training loop.
_SUPPORTED_KEYS = (
    "aio", "bf16", "comms_logger", "communication_data_type", "data_types", "disable_allgather", "disable_python_gc",
    "dump_state", "flops_profiler", "fp16", "gradient_accumulation_steps", "gradient_clipping", "gradient_predivide_factor",
    "managed_gradient_accumulation", "memory_breakdown", "prescale_gradients", "steps_per_print", "timers", "torch_autocast",
    "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)  # fmt: skip
# The trainer's options that determine a value, by the key of DeepSpeed's configuration.
_SET_BY = {
    "train_micro_batch_size_per_gpu": "micro_batch_size", "gradient_accumulation_steps": "accumulate",
    "gradient_clipping": "gradient_clip", "zero_optimization.stage": "zero_stage", "bf16.enabled": "precision",
    "fp16.enabled": "precision", "torch_autocast.enabled": "precision", "torch_autocast.dtype": "precision",
}  # fmt: skip
# Keys that DeepSpeed reads too, and what sets the same thing here.
_SET_ELSEWHERE = {
    "optimizer": "set by the recipe's optimizer",
    "scheduler": "set by the recipe's schedule",
    "train_batch_size": "follows from trainer.micro_batch_size, trainer.accumulate and the number of ranks",
    "gradient_allreduce_op": "gradients are divided by the number of targets",
    "activation_checkpointing": "add bumblebee.transforms.ActivationCheckpointing to task.transforms",
    "compile": "add bumblebee.transforms.Compile to task.transforms",
    "tensorboard": "add callbacks.TensorBoard",
    "wandb": "add callbacks.WandB",
    "csv_monitor": "add callbacks.MetricsHistory",
    "checkpoint": "add callbacks.Checkpoint",
}


@dataclass(frozen=True)
class EngineOptions:
    """The trainer's options that determine DeepSpeed's configuration.

    Args:
        precision: "fp32", "bf16" or "fp16".
        zero_stage: 0 to 3 (arXiv 1910.02054).
        micro_batch_size: samples per micro-batch.
        gradient_clip: maximum gradient norm, or None.
        overrides: further DeepSpeed configuration, merged into ours.
        hidden_size: the model's, which sets stage 3's bucket sizes; None keeps DeepSpeed's defaults.
    """

    precision: str
    zero_stage: int
    micro_batch_size: int
    gradient_clip: float | None
    overrides: DsConfig
    hidden_size: int | None = None

    @property
    def half_dtype(self) -> torch.dtype | None:
        """The 16-bit dtype of matrix products; None in fp32."""
        return HALF_DTYPES.get(self.precision)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products and of attention."""
        return self.half_dtype or torch.float32

    @property
    def offload(self) -> dict[str, str]:
        """The device that the "optimizer" state or the parameters ("param") are offloaded to, for those that are."""
        zero = _without_auto(self.overrides).get("zero_optimization") or {}
        devices = {name: (zero.get(f"offload_{name}") or {}).get("device", "none") for name in ("optimizer", "param")}
        return {name: device for name, device in devices.items() if device != "none"}

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype of the model's weights. At stage 0 they are fp32 and run under autocast."""
        return self.half_dtype if self.half_dtype is not None and self.zero_stage > 0 else torch.float32


def deepspeed_config(options: EngineOptions) -> DsConfig:
    """The configuration for ``deepspeed.initialize``: ours with the user's merged in.

    Raises:
        ValueError: the user's configuration contradicts the trainer's options or has an unsupported key; it is named.
    """
    overrides = _without_auto(options.overrides)
    _check_keys(overrides)
    ours: DsConfig = {
        "train_micro_batch_size_per_gpu": options.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": options.gradient_clip or float("inf"),  # with inf the norm is only measured
        # The memory-efficient linear layer would replace F.linear in the whole process.
        "zero_optimization": {"stage": options.zero_stage, "memory_efficient_linear": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offload with the recipe's optimizer, not DeepSpeed's, which is compiled first
        "steps_per_print": overrides.get("steps_per_print", 2**62),
        "timers": overrides.get("timers", {"throughput": {"enabled": False}}),  # it waits for the GPU in every micro-batch
    }
    if options.half_dtype and options.zero_stage == 0:
        ours["torch_autocast"] = {"enabled": True, "dtype": str(options.half_dtype).removeprefix("torch.")}
    elif options.half_dtype:
        ours[options.precision] = {"enabled": True}
        if options.precision == "bf16":  # skip steps with a non-finite gradient
            ours["bf16"]["check_grad_overflow"] = True
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    _check_precision(overrides, options.precision)
    _check_autocast(overrides, options)
    if options.zero_stage == 0:  # autocast instead: DeepSpeed's bf16 and fp16 keep no fp32 weights there
        overrides = {key: value for key, value in overrides.items() if key not in HALF_DTYPES}
    merged = _merge(ours, overrides, "")
    check_supported(merged)
    if options.zero_stage == 3 and options.hidden_size:
        merged["zero_optimization"] = {**stage_3_buckets(options.hidden_size), **merged["zero_optimization"]}
    return merged


def stage_3_buckets(hidden_size: int) -> dict[str, int]:
    """Bucket sizes of stage 3, in elements: about one matrix of a block each."""
    return {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": hidden_size**2 * 9 // 10,
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }


def uses_nvme(config: DsConfig) -> bool:
    """Whether something is offloaded to NVMe, which needs DeepSpeed's asynchronous I/O operator."""
    settings = config["zero_optimization"].values()
    return any(isinstance(value, dict) and value.get("device") == "nvme" for value in settings)


def _without_auto(overrides: Mapping[str, object]) -> DsConfig:
    """Drop the values "auto" of a file written for Hugging Face's Trainer: ours decides those anyway."""
    kept = {key: _without_auto(value) if isinstance(value, Mapping) else value for key, value in overrides.items()}
    return {key: value for key, value in kept.items() if value != "auto"}


def _check_keys(overrides: DsConfig) -> None:
    for key in overrides:
        if key in _SET_ELSEWHERE:
            raise ValueError(f"trainer.deepspeed.{key} is not supported: {_SET_ELSEWHERE[key]}")
        if key not in _SUPPORTED_KEYS:
            matches = get_close_matches(key, _SUPPORTED_KEYS, n=1)
            hint = f"did you mean {matches[0]!r}?" if matches else f"supported keys: {', '.join(_SUPPORTED_KEYS)}"
            raise ValueError(f"trainer.deepspeed: {key!r} is not supported ({hint})")


def _check_precision(overrides: DsConfig, precision: str) -> None:
    for name in HALF_DTYPES:
        section = overrides.get(name, {})
        if not isinstance(section, dict):
            raise ValueError(f"trainer.deepspeed.{name} must be a mapping such as {{enabled: true}}, got {section!r}")
        enabled = section.get("enabled", precision == name)
        if enabled != (precision == name):
            change = f" or set trainer.precision to {name}" if enabled else ""
            raise ValueError(
                f"trainer.deepspeed.{name}.enabled is {enabled!r}, but trainer.precision is {precision!r}: drop it{change}"
            )


def _check_autocast(overrides: DsConfig, options: EngineOptions) -> None:
    """Autocast is what 16-bit precisions mean at stage 0. Anywhere else it would change the precision behind our back."""
    section = overrides.get("torch_autocast", {})
    name = "trainer.deepspeed.torch_autocast"
    if not isinstance(section, dict):
        raise ValueError(f"{name} must be a mapping such as {{enabled: true}}, got {section!r}")
    if not section.get("enabled"):
        return
    enabled = f"{name}.enabled is {section['enabled']!r}, but trainer.precision"
    if options.half_dtype is None:
        raise ValueError(f"{enabled} is 'fp32': drop it or set trainer.precision to bf16")
    if options.zero_stage > 0:
        raise ValueError(
            f"{enabled} {options.precision!r} has weights of that dtype at trainer.zero_stage {options.zero_stage}: drop it,"
            " or set trainer.zero_stage to 0 for fp32 weights under autocast"
        )


def _merge(ours: DsConfig, overrides: DsConfig, path: str) -> DsConfig:
    result = dict(ours)
    for key, value in overrides.items():
        full = f"{path}{key}"
        if isinstance(value, dict) and isinstance(ours.get(key, {}), dict):
            result[key] = _merge(ours.get(key, {}), value, f"{full}.")
        elif key in ours and ours[key] != value:
            option = f"trainer.{_SET_BY[full]}" if full in _SET_BY else "the training loop"
            expected = "" if full == "gradient_accumulation_steps" else f" ({ours[key]!r})"
            raise ValueError(f"trainer.deepspeed.{full} is {value!r}, but {option} decides that{expected}: drop it")
        else:
            result[key] = value
    return result


# -- the stage -------------------------------------------------------------------------------------------------------------


def resolve_stage(stage: int | None, deepspeed: DsConfig | str | None) -> int:
    """Return the ZeRO stage: the trainer's, else that of the user's DeepSpeed configuration, else 1.

    Args:
        stage: ``trainer.zero_stage``.
        deepspeed: ``trainer.deepspeed``.

    Raises:
        ValueError: the two contradict each other, or the configuration cannot be read or has no valid stage.
    """
    zero = _without_auto(read_overrides(deepspeed)).get("zero_optimization", {})
    name = "trainer.deepspeed.zero_optimization"
    if not isinstance(zero, dict):
        raise ValueError(f"{name} must be a mapping such as {{stage: 2}}, got {zero!r}")
    configured = zero.get("stage")
    if configured is None:
        return 1 if stage is None else stage
    if isinstance(configured, bool) or configured not in (0, 1, 2, 3):
        raise ValueError(f"{name}.stage must be 0, 1, 2 or 3, got {configured!r}")
    if stage is not None and stage != configured:
        source = f"{name}.stage" if not isinstance(deepspeed, str) else f"zero_optimization.stage in {deepspeed}"
        raise ValueError(
            f"trainer.zero_stage is {stage}, but {source} is {configured}:"
            f" set trainer.zero_stage to {configured}, or to null to follow trainer.deepspeed"
        )
    return int(configured)


def read_overrides(value: DsConfig | str | None) -> DsConfig:
    """Read ``trainer.deepspeed``: None, a dict, or the path of a JSON file.

    Raises:
        ValueError: the file cannot be read, or does not hold a JSON object.
    """
    if value is None or isinstance(value, dict):
        return _nest(value or {})
    try:
        content = json.loads(Path(value).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"trainer.deepspeed: cannot read {value}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"trainer.deepspeed: {value} is not a JSON object")
    return content


def _nest(options: DsConfig) -> DsConfig:
    """Expand dotted keys: jsonargparse parses ``--trainer.deepspeed.a.b 2`` as {"a.b": "2"}; returns {"a": {"b": 2}}."""
    result: DsConfig = {}
    for key, value in options.items():
        *parents, last = key.split(".")
        target = result
        for parent in parents:
            target = target.setdefault(parent, {})
        if isinstance(value, dict):
            target[last] = {**target.get(last, {}), **_nest(value)}
        else:
            target[last] = _from_text(value) if isinstance(value, str) else value
    return result


def _from_text(value: str) -> object:
    try:
        return json.loads(value)
    except ValueError:
        return value
