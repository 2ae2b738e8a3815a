"""``bumblebee rollouts``: read the completions of a GRPO run, and rate its prompts by how often they are solved."""

from __future__ import annotations

import json
import shutil
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import PositiveInt

from bumblebee.cli.errors.value_errors import user_errors
from bumblebee.cli.parser import Parser, command_parser
from bumblebee.utils.formatting import number, plural, printable

if TYPE_CHECKING:
    from bumblebee.rl.rollout_reader import LoggedRollout

KEY = "pass_rate"


def parser() -> Parser:
    """Return the options of the command."""
    options = command_parser("rollouts")
    options.add_argument("run", type=str, help="output folder of a GRPO run")
    options.add_argument(
        "--step", type=int | Literal["last", "all"], default="last", help="which of the steps that the run kept"
    )
    orders = Literal["extremes", "best", "worst", "sampled"]
    order_help = "by reward: best and worst alternately, falling or rising; or as sampled, groups together"
    options.add_argument("--order", type=orders, default="extremes", help=order_help)
    options.add_argument("--count", type=PositiveInt, default=6, help="completions on a page")
    options.add_argument("--page", type=PositiveInt, default=1, help="which page to show")
    options.add_argument("--characters", type=PositiveInt, default=1000, help="of a text; longer ones lack their middle")
    rates_help = f"write the data's records with the share of solved completions as {KEY!r} to this .jsonl file instead"
    options.add_argument("--pass_rates", type=str | None, default=None, help=rates_help)
    options.add_argument("--solved", type=float, default=1.0, help="reward from which on a completion solves its prompt")
    options.add_argument("--reward", type=str | None, default=None, help="reward function for that; null: the weighted sum")
    return options


def run(words: Sequence[str]) -> None:
    """Execute the command."""
    options = parser()
    cfg = options.parse(words)
    with user_errors(cfg, options.words):
        from bumblebee.rl.rollout_reader import ordered, pass_rates, read_rollouts

        if cfg.pass_rates is not None:
            rates = pass_rates(read_rollouts(cfg.run, "all"), cfg.reward, cfg.solved)
            print(_write_rates(rates, Path(cfg.pass_rates)))
            return
        rollouts = read_rollouts(cfg.run, cfg.step)
        pages = -(-len(rollouts) // cfg.count)
        if cfg.page > pages:
            raise ValueError(f"page: {cfg.page} is after the last of {plural(pages, 'page')} of {cfg.count} completions")
    first = (cfg.page - 1) * cfg.count
    print(_summary(rollouts))
    for index, each in enumerate(ordered(rollouts, cfg.order)[first : first + cfg.count], start=first + 1):
        print("\n".join(_entry(index, each, cfg.characters)))
    print(f"page {cfg.page} of {pages}" + (f"; more: --page {cfg.page + 1}" if cfg.page < pages else ""))


def _summary(rollouts: Sequence[LoggedRollout]) -> str:
    steps, rewards = [each.step for each in rollouts], [each.reward for each in rollouts]
    span = f"step {steps[0]:,}" if steps[0] == steps[-1] else f"steps {min(steps):,} to {max(steps):,}"
    counts = f"{plural(len(rollouts), 'completion')} of {plural(len({each.place for each in rollouts}), 'prompt')}"
    truncated = sum(each.truncated for each in rollouts) / len(rollouts)
    spread = f"{statistics.fmean(rewards):.4g} ± {statistics.pstdev(rewards):.4g}"
    return f"{span}: {counts}, reward {spread}, {truncated:.0%} truncated"


def _entry(index: int, each: LoggedRollout, characters: int) -> list[str]:
    rewards = ", ".join(f"{name} {value:.4g}" for name, value in each.rewards.items())
    length = plural(each.tokens, "token") + (", truncated" if each.truncated else "")
    head = f"{index}  step {each.step:,}  reward {each.reward:.4g} ({rewards})  advantage {each.advantage:+.3g}  {length}"
    return [f"{head}  {each.place}", *_wrapped(each.prompt, "? ", characters), *_wrapped(each.completion, "→ ", characters)]


def _wrapped(text: str, sign: str, characters: int) -> list[str]:
    """Lines of a text, indented; the first begins with a sign."""
    if len(text) > characters:
        text = f"{text[: characters // 2]} … {text[-characters // 2 :]}"
    text = "\n".join(map(printable, text.splitlines()))
    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns)) - 5
    lines = [part for line in text.splitlines() or [""] for part in textwrap.wrap(line, width) or [""]]
    return [f"   {sign if number == 0 else '  '}{line}" for number, line in enumerate(lines)]


def _write_rates(rates: dict[str, float], output: Path) -> str:
    """Write the records of all files that the rates are of; those without completions keep what they have.

    Raises:
        ValueError: the output is not a .jsonl file, or one of the files that are read.
    """
    from bumblebee.utils.text_files import write_text
    from datamodules import record_files

    files = list(dict.fromkeys(place.rpartition(":")[0] for place in rates))
    if output.suffix != ".jsonl" or output.resolve() in [Path(file).resolve() for file in files]:
        raise ValueError(f"pass_rates: {output} must be a new .jsonl file")
    lines, rated = [], 0
    for record in (record for file in files for record in record_files.read(file)):
        rate = rates.get(f"{record.file}:{record.line}")
        rated += rate is not None
        value = record.value if rate is None else {**record.value, KEY: rate}
        lines.append(json.dumps(value, ensure_ascii=False) + "\n")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, "".join(lines))
    never, always = (sum(rate == bound for rate in rates.values()) for bound in (0.0, 1.0))
    unrated = f", {number(len(lines) - rated)} without completions" if len(lines) > rated else ""
    return f"{output}: {plural(rated, 'prompt')} rated ({number(never)} never solved, {number(always)} always){unrated}"
