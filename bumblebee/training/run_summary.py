"""Summary of a run: model, features, data, plan, device and optimizer as plain values, and as a block of text.

``summarize`` collects the values of summary.json; ``format_summary`` formats them for the console.
"""

from __future__ import annotations

import inspect
import textwrap
from typing import TYPE_CHECKING, Any

import bumblebee
from bumblebee.distributed.deepspeed.sharded_parameters import full_numel
from bumblebee.hardware.flops import num_active_parameters
from bumblebee.utils.formatting import number, plural, short

if TYPE_CHECKING:
    from bumblebee.training.run_state import RunState

Section = dict[str, Any]  # a JSON object of summary.json

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
        "schedule": {"class": type(trainer.schedule).__name__, **_options(trainer.schedule)},
        "features": _features(trainer),
        "verify": _verify(trainer),
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
    from bumblebee.nn.attention_kernels import kernel_of

    return kernel_of(trainer.task.model, trainer.engine.options.compute_dtype)


def _verify(trainer: RunState) -> Section:
    from bumblebee.training.verification_record import summarize_verification

    return summarize_verification(trainer)


def _features(trainer: RunState) -> Section:
    """What changes how a run trains and saves besides its other sections: transforms, offload, seed, length, callbacks."""
    callbacks = {name: callback.summary() for name, callback in trainer.callbacks.items()}
    return {
        "transforms": [{"class": _name(transform), **_options(transform)} for transform in trainer.task.transforms],
        "offload": trainer.engine.options.offload,
        "seed": trainer.seed,
        "max_length": getattr(trainer.data, "max_length", None),
        "callbacks": {name: options for name, options in callbacks.items() if options},
    }


def _name(transform: object) -> str:
    """The name of a function, or of an object's class."""
    return getattr(transform, "__name__", type(transform).__name__)


def _options(configured: object) -> Section:
    """The attributes of an object that are arguments of its class, without state that changes during the run."""
    names = inspect.signature(type(configured)).parameters
    return {name: value for name, value in vars(configured).items() if name in names}


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


def format_summary(summary: dict[str, Section], width: int | None = None) -> str:
    """Format the summary as an indented block, one line per section; longer ones are wrapped to ``width`` columns."""
    run = summary["run"]
    lines = {
        "model": _model_line(summary["model"]),
        "task": _class_line(summary["task"]),
        "data": _class_line(summary["data"]),
        "plan": _plan_line(summary["plan"]),
        "device": _device_line(summary["device"], summary["plan"]["ranks"]),
        "optimizer": _optimizer_line(summary["optimizer"]),
        "schedule": _class_line(summary["schedule"]),
        "features": _features_line(summary["features"]),
        "callbacks": ", ".join(summary["callbacks"].values()) or "none",
        "verify": _verify_line(summary["verify"]),
        "output": run["output_dir"],
    }
    if run["resumed_from_step"]:
        lines["resumed"] = f"from step {number(run['resumed_from_step'])}"
    return "\n".join([f"Bumblebee {run['bumblebee']}", *(_line(name, text, width) for name, text in lines.items())])


def _line(name: str, text: str, width: int | None) -> str:
    line = f"  {name:<10} {text}"
    if width is None:
        return line
    return textwrap.fill(line, width, subsequent_indent=" " * 13, break_long_words=False, break_on_hyphens=False)


def _model_line(model: Section) -> str:
    count, trained = model["parameters"], model["trainable_parameters"]
    share = "all trainable" if trained == count else f"{short(trained)} ({trained / count:.2%}) trainable"
    active = f" ({short(model['active_parameters'])} active)" if model["active_parameters"] < count else ""
    parts = [f"{model['class']}, {short(count)} parameters{active}, {share}"]
    parts += [f"{name.replace('_', ' ')} {number(model[name])}" for name in _SHAPE if name in model]
    if model["attention"]:
        parts.append(f"attention {model['attention']}")
    return ", ".join(parts)


def _features_line(features: Section) -> str:
    parts = [_with_options(transform["class"], transform) for transform in features["transforms"]]
    names = {"optimizer": "optimizer state", "param": "parameters"}
    parts += [f"{names[name]} offloaded to {device}" for name, device in features["offload"].items()]
    parts.append(f"seed {features['seed']}")
    if features["max_length"]:
        parts.append(f"max length {number(features['max_length'])}")
    return ", ".join([*parts, *(_with_options(name, _in_steps(options)) for name, options in features["callbacks"].items())])


def _in_steps(options: Section) -> Section:
    """The options of a callback, with the unit of its interval."""
    return {
        name: plural(value, "step") if name == "every" and isinstance(value, int) else value for name, value in options.items()
    }


def _with_options(name: str, options: Section) -> str:
    """A name and, in parentheses, the options in use: those that are neither null, false nor 0."""
    used = {key: value for key, value in options.items() if key != "class" and value}
    words = [f"{key.replace('_', ' ')} {_format_value(value)}" for key, value in used.items()]
    return f"{name} ({', '.join(words)})" if words else name


def _plan_line(plan: Section) -> str:
    epochs = f"{plan['epochs']:.3g} {'epoch' if plan['epochs'] == 1 else 'epochs'}"
    return (
        f"{epochs} of {plural(plan['steps_per_epoch'], 'step')} = {plural(plan['steps'], 'step')} of"
        f" {plural(plan['samples_per_step'], 'sample')} (micro-batch {plan['micro_batch_size']}"
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


def _verify_line(verify: Section) -> str:
    date = verify.get("date", "")[:10]
    if verify["status"] == "none":
        return "not run"
    if verify["status"] == "outdated":
        return f"not for this setup: {'; '.join(verify['differences'])}"
    if verify["status"] == "failed":
        return f"FAILED on {date}: {', '.join(verify['failed'])}"
    return f"passed {plural(verify['passed'], 'check')} on {date}"


def _class_line(section: Section) -> str:
    """A class name and its options; texts have a colon, and semicolons separate texts with commas."""
    used = {key.replace("_", " "): value for key, value in section.items() if key != "class" and value is not None}
    options = [f"{key}{':' * isinstance(value, str)} {_format_value(value)}" for key, value in used.items()]
    separator = "; " if any("," in value for value in used.values() if isinstance(value, str)) else ", "
    return separator.join([section["class"], *options])


def _format_value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return number(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
