"""The preview as lines to read."""

from __future__ import annotations

import shutil
from typing import Any

from bumblebee.formatting import number, short, span
from bumblebee.hardware.flops import num_active_parameters
from bumblebee.preview.parameter_counts import parts
from bumblebee.preview.preview import Preview, amount
from bumblebee.preview.sample_text import Marks, shown
from bumblebee.preview.sparkline import sparkline

NAME = 20  # columns of a name


def lines(preview: Preview, samples: int) -> list[str]:
    """All sections."""
    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    marks = Marks.of_terminal()
    found = [*_samples(preview, samples, marks, width), *_data(preview, width), *_plan(preview), *_parameters(preview)]
    found += [*_memory(preview), *_time(preview)]
    return [*found, *(f"note: {warning}" for warning in preview.warnings)]


def _line(name: str, value: str, width: int = 1000, column: int = NAME) -> str:
    text = f"  {name:<{column}} {value}"
    return text if len(text) <= width else text[: width - 1] + "…"


def _samples(preview: Preview, count: int, marks: Marks, width: int) -> list[str]:
    if not count:
        return []
    return [f"samples: {marks.legend}", *(f"  {line}" for line in shown(preview.data, count, marks, width))]


def _data(preview: Preview, width: int) -> list[str]:
    summary = preview.data.summary()
    column = max([NAME, *map(len, summary)])
    body = (_line(name, _value(value), width, column) for name, value in summary.items())
    return [f"data: {type(preview.data).__name__}", *body]


def _value(value: Any) -> str:
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _plan(preview: Preview) -> list[str]:
    plan, schedule, rate = preview.plan, preview.schedule, preview.learning_rate
    total = plan.max_steps
    ranks = f"{plan.world_size} rank" + "s" * (plan.world_size > 1)
    warmup = min(schedule.warmup_of(total), total - 1)
    steps = dict.fromkeys((0, warmup, total - 1)) if rate is not None else {}
    points = ", ".join(f"{(rate or 0.0) * schedule.factor(step, total):.3g} in step {step + 1:,}" for step in steps)
    resumed = [_line("continues", f"after step {plan.origin.step:,}")] if plan.origin.step else []
    step = f"micro-batch {plan.micro_batch_size} × accumulate {plan.accumulate} × {ranks}"
    return [
        "plan",
        _line("one step", f"{step} = {number(plan.samples_per_step)} samples"),
        _line("steps", f"{number(plan.steps_per_epoch)} an epoch × {plan.epoch(total):.3g} epochs = {number(total)}"),
        *resumed,
        _line("learning rate", f"{type(schedule).__name__}, warm-up {_steps(warmup)}{': ' * bool(points)}{points}"),
        _line("", "|" + sparkline(lambda step: schedule.factor(step, total), total) + "|"),
        _line("ends in", f"{preview.output_dir}, with the trained model"),
    ]


def _steps(count: int) -> str:
    return f"{number(count)} step" + "s" * (count != 1)


def _parameters(preview: Preview) -> list[str]:
    found = parts(preview.task.model)
    count, trained = (sum(pair[side] for pair in found.values()) for side in (0, 1))
    rows = [*found.items(), ("total", (count, trained))]
    table = [f"  {name:<{NAME}} {short(all_):>9} {short(own):>11}" for name, (all_, own) in rows]
    table[-1] += f"  ({trained / count:.2%})"
    if (active := num_active_parameters(preview.task.model)) < count:
        table.append(_line("active", f"{short(active):>9}  for each token"))
    return [f"{'parameters':<{NAME + 2}} {'all':>9} {'trained':>11}", *table]


def _memory(preview: Preview) -> list[str]:
    memory, total, rehearsal = preview.memory, preview.total, preview.rehearsal
    known = preview.size.config is not None or rehearsal is not None
    rows, length = preview.batch["input_ids"].shape
    what = f"micro-batch of {rows} × {length} tokens" + (f", attention {preview.kernel}" if preview.kernel else "")
    how = "measured: a few steps" if rehearsal else f"computed, not measured: {preview.why_not}"
    if rehearsal and preview.ranks > 1:
        how += " on one rank; what more ranks save is computed"
    setup = preview.setup
    entries = {
        "weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer,
        "other models": memory.beside, "activations, other": total - memory.lasting,
    }  # fmt: skip
    body = [_line(name, f"{amount(value):>10}") for name, value in entries.items() if value or name == "weights"]
    if not known:
        body[-1] = _line("activations, other", "not known for this model: --measure always")
    stage = f"{setup.precision}, ZeRO stage {setup.stage}, {setup.ranks} × {setup.device}"
    return [
        f"memory of each device ({stage}; {what})",
        *body,
        _line("total", f"{'' if known else 'more than '}{amount(total):>10}  ({how})"),
        *(
            [_line("not in it", f"{amount(rehearsal.before):>10}  Python and its libraries")]
            if rehearsal and rehearsal.before
            else []
        ),
    ]


def _time(preview: Preview) -> list[str]:
    seconds = preview.seconds_of_a_step
    if seconds is None:
        return ["time: not known for this device"]
    steps = preview.plan.max_steps - preview.plan.origin.step
    shortest, longest = (span(steps * bound) for bound in seconds)
    if preview.rehearsal is not None:
        how = f"{len(preview.rehearsal.seconds)} steps timed on this device"
        how += ", ranks' talking not included" if preview.ranks > 1 else ""
    else:
        how = f"20 to 60 % of {short(preview.rate)}FLOP/s of matrix products on this device"
    each = f"{span(seconds[0])} to {span(seconds[1])} a step"
    return [f"time: about {shortest} to {longest}, {each}", f"  ({how}; without validation and saving)"]
