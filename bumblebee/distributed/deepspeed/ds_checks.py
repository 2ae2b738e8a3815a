"""Combinations of DeepSpeed options that it refuses, or would ignore, with gradients accumulated by our loop.

DeepSpeed refuses some with an assertion on every rank, after the model is built. Here each is one line, before anything is
read or written. Checked against the source of DeepSpeed 0.19.8: ``_do_sanity_check`` of its engine, the constructors of its
optimizers and the validators of its configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_ZERO = "trainer.deepspeed.zero_optimization"
_OFFLOAD = ("offload_optimizer", "offload_param")
_REDUCIBLE = ("fp16", "bf16", "fp32")


def check_supported(config: Mapping[str, Any]) -> None:
    """Check a complete configuration.

    Raises:
        ValueError: a combination that does not work; the message names the option and what would work.
    """
    if problem := next(_problems(config), None):
        raise ValueError(problem)


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    zero = config["zero_optimization"]
    stage = zero["stage"]
    if zero.get("overlap_comm") and stage < 2:
        # Below stage 2 the loop reduces gradients in one go in step(), so that there is nothing to overlap with.
        yield f"{_ZERO}.overlap_comm is true, which needs trainer.zero_stage 2 or 3, not {stage}: drop it or change the stage"
    if zero.get("compute_grad_norm") is False:
        yield f"{_ZERO}.compute_grad_norm is false, but the gradient norm is a metric of every step: drop it"
    if zero.get("legacy_stage1"):
        yield f"{_ZERO}.legacy_stage1 is true, but DeepSpeed no longer has the old stage 1: drop it"
    if zero.get("zenflow"):
        yield f"{_ZERO}.zenflow is not supported: it counts the micro-batches of a step itself"
    yield from _problems_of_offload(zero, stage)
    yield from _problems_of_reduction(config, stage)


def _problems_of_offload(zero: Mapping[str, Any], stage: int) -> Iterator[str]:
    for name in _OFFLOAD:
        section = zero.get(name) or {}
        if not isinstance(section, Mapping):
            yield f"{_ZERO}.{name} must be a mapping such as {{device: cpu}}, got {section!r}"
            return
        device = section.get("device", "none")
        if device not in ("none", "cpu", "nvme"):
            yield f"{_ZERO}.{name}.device must be none, cpu or nvme, got {device!r}"
        if device == "nvme" and stage != 3:
            yield f"{_ZERO}.{name}.device: nvme needs trainer.zero_stage 3"
        if device == "nvme" and not section.get("nvme_path"):
            yield f"{_ZERO}.{name}.nvme_path is missing: set a folder on the NVMe disk"
        least = 3 if name == "offload_param" else 1
        if device != "none" and stage < least:
            needed = "3" if least == 3 else "1, 2 or 3"
            yield f"{_ZERO}.{name} needs trainer.zero_stage {needed}, not {stage}: drop it or change the stage"
    if (zero.get("offload_optimizer") or {}).get("ratio", 1) != 1 and stage != 3:
        yield f"{_ZERO}.offload_optimizer.ratio below 1 needs trainer.zero_stage 3, not {stage}"


def _problems_of_reduction(config: Mapping[str, Any], stage: int) -> Iterator[str]:
    dtype = config.get("communication_data_type")
    if dtype is not None and str(dtype).lower() not in _REDUCIBLE:
        yield f"trainer.deepspeed.communication_data_type must be fp32, bf16 or fp16, got {dtype!r}"
    zero = config["zero_optimization"]
    if stage < 2 or zero.get("reduce_scatter") is False:
        return
    scattered = f"needs {_ZERO}.reduce_scatter false at trainer.zero_stage {stage}"
    if config.get("gradient_predivide_factor", 1) != 1:
        yield f"trainer.deepspeed.gradient_predivide_factor {scattered}"
    if config.get("prescale_gradients"):
        yield f"trainer.deepspeed.prescale_gradients {scattered}"
