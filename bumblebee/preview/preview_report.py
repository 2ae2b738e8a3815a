"""The preview as text."""

from __future__ import annotations

import shutil

from bumblebee.hardware.flops import num_active_parameters
from bumblebee.preview.parameter_counts import count_by_component
from bumblebee.preview.preview import Preview, format_bytes
from bumblebee.preview.sample_text import Highlight, format_samples
from bumblebee.preview.sparkline import sparkline
from bumblebee.utils.formatting import number, plural, short, span

LABEL_WIDTH = 20


def print_report(preview: Preview, samples: int) -> None:
    """Print the preview, with this many samples."""
    print("\n".join(format_report(preview, samples)), flush=True)


def format_report(preview: Preview, samples: int) -> list[str]:
    """Format all sections as lines."""
    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    return [
        *_samples(preview, samples, Highlight.for_stdout(), width), *_data(preview, width), *_plan(preview),
        *_parameters(preview), *_memory(preview), *_time(preview),
        *(f"note: {warning}" for warning in preview.warnings),
    ]  # fmt: skip


def _line(label: str, value: str, width: int = 1000, label_width: int = LABEL_WIDTH) -> str:
    text = f"  {label:<{label_width}} {value}"
    return text if len(text) <= width else text[: width - 1] + "…"


def _samples(preview: Preview, count: int, highlight: Highlight, width: int) -> list[str]:
    if not count:
        return []
    data = preview.data
    notes = preview.workload.task.notes_on([data.train[index] for index in range(min(count, len(data.train)))])
    lines = format_samples(data, count, highlight, width, notes=notes)
    return [f"samples: {highlight.legend}", *(f"  {line}" for line in lines)]


def _data(preview: Preview, width: int) -> list[str]:
    summary = preview.data.summary()
    label_width = max([LABEL_WIDTH, *map(len, summary)])
    lines = (_line(label, _value(value), width, label_width) for label, value in summary.items())
    return [f"data: {type(preview.data).__name__}", *lines]


def _value(value: object) -> str:
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _plan(preview: Preview) -> list[str]:
    plan, schedule, lr = preview.workload.plan, preview.schedule, preview.learning_rate
    total, epochs = plan.max_steps, f"{plan.epoch(plan.max_steps):.3g}"
    ranks = plural(plan.world_size, "rank")
    warmup = min(schedule.warmup_of(total), total - 1)
    steps = dict.fromkeys((0, warmup, total - 1)) if lr is not None else {}
    rates = ", ".join(f"{(lr or 0.0) * schedule.factor(step, total):.3g} in step {step + 1:,}" for step in steps)
    resumed = [_line("resumes", f"after step {plan.origin.step:,}")] if plan.origin.step else []
    batch = f"micro-batch {plan.micro_batch_size} × accumulate {plan.accumulate} × {ranks}"
    return [
        "plan",
        _line("batch size", f"{batch} = {number(plan.samples_per_step)} samples"),
        _line("steps", f"{number(plan.steps_per_epoch)} per epoch × {epochs} epoch{'s' * (epochs != '1')} = {number(total)}"),
        *resumed,
        _line("learning rate", f"{type(schedule).__name__}, warm-up {plural(warmup, 'step')}{': ' * bool(rates)}{rates}"),
        _line("", "|" + sparkline(lambda step: schedule.factor(step, total), total) + "|"),
        _line("output", str(preview.output_dir)),
    ]


def _parameters(preview: Preview) -> list[str]:
    model = preview.workload.model
    counts = count_by_component(model)
    total, trainable = (sum(pair[column] for pair in counts.values()) for column in (0, 1))
    rows = [*counts.items(), ("total", (total, trainable))]
    lines = [f"  {name:<{LABEL_WIDTH}} {short(count):>9} {short(trained):>11}" for name, (count, trained) in rows]
    lines[-1] += f"  ({trainable / total:.2%})"
    if (active := num_active_parameters(model)) < total:
        lines.append(_line("active", f"{short(active):>9}  per token"))
    return [f"{'parameters':<{LABEL_WIDTH + 2}} {'total':>9} {'trainable':>11}", *lines]


def _memory(preview: Preview) -> list[str]:
    workload, dry_run, total = preview.workload, preview.dry_run, preview.total_memory
    estimate = workload.memory()
    known = workload.model_size.config is not None or dry_run is not None
    entries = {
        "weights": estimate.weights, "gradients": estimate.gradients, "optimizer": estimate.optimizer,
        "frozen models": estimate.frozen_models, "activations, other": total - estimate.persistent,
    }  # fmt: skip
    lines = [_line(label, f"{format_bytes(value):>10}") for label, value in entries.items() if value or label == "weights"]
    if not known:
        lines[-1] = _line("activations, other", "unknown for this model; use --measure always")
    if (sampling := workload.completions) is not None:
        count, positions = sampling
        kept = f"KV cache of {number(count)} × {number(positions)} tokens"
        if workload.gathering is not None:
            kept += " and the weights of a layer" if workload.gathering.layers else " and the whole weights"
        lines.append(_line("while sampling", f"{format_bytes(estimate.sampling):>10}  {kept}, instead of activations"))
        if workload.gathering is not None:
            lines.append(_line("gathered weights", f"{workload.gathering}"))
    lines.append(_line("total", f"{'' if known else 'more than '}{format_bytes(total):>10}  ({_memory_source(preview)})"))
    if dry_run and dry_run.baseline:
        lines.append(_line("not included", f"{format_bytes(dry_run.baseline):>10}  Python and libraries"))
    return [_memory_heading(preview), *lines]


def _memory_heading(preview: Preview) -> str:
    workload = preview.workload
    rows, length = workload.batch["input_ids"].shape
    setup, kernel = workload.setup(), workload.attention_kernel
    run = f"{setup.precision}, ZeRO stage {setup.stage}, {setup.ranks} × {setup.device}"
    return f"memory per device ({run}; micro-batch of {rows} × {length} tokens{f', attention {kernel}' if kernel else ''})"


def _memory_source(preview: Preview) -> str:
    if preview.dry_run is None:
        return f"estimated: {preview.why_computed}"
    several = preview.workload.ranks > 1
    return "measured in a dry run" + (" on one rank, savings of more ranks estimated" if several else "")


def _time(preview: Preview) -> list[str]:
    workload, seconds = preview.workload, preview.step_seconds
    if seconds is None:
        return ["time: unknown for this device"]
    steps = workload.plan.max_steps - workload.plan.origin.step
    shortest, longest = (span(steps * bound) for bound in seconds)
    if preview.dry_run is not None:
        source = f"{plural(len(preview.dry_run.step_seconds), 'step')} timed in a dry run"
        source += ", without communication between ranks" if workload.ranks > 1 else ""
    else:
        source = f"at 20 to 60 % of this device's {short(workload.peak_flops)}FLOP/s in matrix products"
        source += ", without sampling completions" if workload.completions else ""
    per_step = f"{span(seconds[0])} to {span(seconds[1])} per step"
    return [f"time: about {shortest} to {longest}, {per_step}", f"  ({source}; without validation and checkpoints)"]
