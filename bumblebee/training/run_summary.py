"""Summary of a run: model, data, plan, device and optimizer as plain values, and as a block of text.

``summarize`` collects the values of summary.json; ``format_summary`` formats them for the console.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bumblebee
from bumblebee.distributed.deepspeed.sharded_parameters import full_numel
from bumblebee.hardware.flops import num_active_parameters
from bumblebee.utils.formatting import number, short

if TYPE_CHECKING:
    from bumblebee.training.run_state import RunState

Section = dict[str, Any]

# Name in the summary -> attribute of the model's config, which are Hugging Face's.
_SHAPE = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocabulary": "vocab_size",
}


def summarize(trainer: RunState) -> dict[str, Section]:
    """Collect the sections of the summary."""
    return {
        "run": {
            "bumblebee": bumblebee.__version__,
            "output_dir": str(trainer.output_dir),
            "seed": trainer.seed,
            "resumed_from_step": trainer.step or None,
        },
        "model": _model(trainer),
        "task": {"class": type(trainer.task).__name__, **trainer.task.summary()},
        "data": {"class": type(trainer.data).__name__, **trainer.data.summary()},
        "plan": _plan(trainer),
        "device": _device(trainer),
        "optimizer": _optimizer(trainer),
        "schedule": {"class": type(trainer.schedule).__name__, **vars(trainer.schedule)},
        "callbacks": {name: type(callback).__name__ for name, callback in trainer.callbacks.items()},
    }


def _model(trainer: RunState) -> Section:
    model = trainer.task.model
    config = getattr(model, "config", None)
    shape = {name: getattr(config, field, None) for name, field in _SHAPE.items()}
    return {
        "class": type(model).__name__,
        "parameters": sum(full_numel(p) for p in model.parameters()),
        "trainable_parameters": sum(full_numel(p) for p in model.parameters() if p.requires_grad),
        "active_parameters": num_active_parameters(model),
        **{name: value for name, value in shape.items() if value is not None},
        "attention": _attention(trainer),
    }


def _attention(trainer: RunState) -> str | None:
    """The attention kernel; None for a model class other than Bumblebee."""
    import torch

    from bumblebee.model import Bumblebee
    from bumblebee.nn.attention_kernels import select_kernel

    model = trainer.task.model
    if not isinstance(model, Bumblebee):
        return None
    return select_kernel(model.attention, torch.bfloat16 if trainer.precision == "bf16" else torch.float32)


def _plan(trainer: RunState) -> Section:
    plan = trainer.plan
    return {
        "epochs": round(plan.epoch(plan.max_steps), 6),
        "steps_per_epoch": plan.steps_per_epoch,
        "steps": plan.max_steps,
        "micro_batch_size": plan.micro_batch_size,
        "accumulate": plan.accumulate,
        "ranks": plan.world_size,
        "samples_per_step": plan.samples_per_step,
    }


def _device(trainer: RunState) -> Section:
    import torch

    name = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else None
    return {
        "device": str(trainer.device),
        "name": name,
        "precision": trainer.precision,
        "zero_stage": trainer.zero_stage,
    }


def _optimizer(trainer: RunState) -> Section:
    engine = trainer.engine
    groups = [
        {
            "learning_rate": group.get("initial_lr", group["lr"]),  # the schedule changes "lr"
            "weight_decay": group.get("weight_decay", 0.0),
            "parameters": size,
        }
        for group, size in zip(engine.parameter_groups, engine.group_sizes, strict=True)
    ]
    return {"class": engine.optimizer_name, "groups": groups, "gradient_clip": trainer.gradient_clip}


# -- text --------------------------------------------------------------------------------------------------------------


def format_summary(summary: dict[str, Section]) -> str:
    """Format the summary as an indented block, one line per section."""
    run = summary["run"]
    lines = {
        "model": _model_line(summary["model"]),
        "task": _class_line(summary["task"]),
        "data": _class_line(summary["data"]),
        "plan": _plan_line(summary["plan"]),
        "device": _device_line(summary["device"], summary["plan"]["ranks"]),
        "optimizer": _optimizer_line(summary["optimizer"]),
        "schedule": _class_line(summary["schedule"]),
        "callbacks": ", ".join(summary["callbacks"].values()) or "none",
        "output": run["output_dir"],
    }
    if run["resumed_from_step"]:
        lines["resumed"] = f"from step {number(run['resumed_from_step'])}"
    return "\n".join([f"Bumblebee {run['bumblebee']}", *(f"  {name:<10} {line}" for name, line in lines.items())])


def _model_line(model: Section) -> str:
    count, trained = model["parameters"], model["trainable_parameters"]
    share = "all trainable" if trained == count else f"{short(trained)} ({trained / count:.2%}) trainable"
    active = f" ({short(model['active_parameters'])} active)" if model["active_parameters"] < count else ""
    parts = [f"{model['class']}, {short(count)} parameters{active}, {share}"]
    parts += [f"{name.replace('_', ' ')} {number(model[name])}" for name in _SHAPE if name in model]
    if model["attention"]:
        parts.append(f"attention {model['attention']}")
    return ", ".join(parts)


def _plan_line(plan: Section) -> str:
    return (
        f"{plan['epochs']:.3g} epochs of {number(plan['steps_per_epoch'])} steps = {number(plan['steps'])} steps"
        f" of {number(plan['samples_per_step'])} samples (micro-batch {plan['micro_batch_size']}"
        f" x accumulate {plan['accumulate']} x ranks {plan['ranks']})"
    )


def _device_line(device: Section, ranks: int) -> str:
    name = device["name"] or device["device"]
    return f"{ranks} x {name}, {device['precision']}, ZeRO stage {device['zero_stage']}"


def _optimizer_line(optimizer: Section) -> str:
    groups = [
        f"lr {group['learning_rate']:g}, weight decay {group['weight_decay']:g} for {short(group['parameters'])} parameters"
        for group in optimizer["groups"]
    ]
    clip = optimizer["gradient_clip"]
    return "; ".join(
        [f"{optimizer['class']}: {groups[0]}", *groups[1:], f"gradient clip {clip:g}" if clip else "no gradient clipping"]
    )


def _class_line(section: Section) -> str:
    """A class name and its options."""
    options = [
        f"{key.replace('_', ' ')} {_format(value)}" for key, value in section.items() if key != "class" and value is not None
    ]
    return ", ".join([section["class"], *options])


def _format(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return number(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
