"""Records of the GPU benchmark: lines of JSON as they come, and a Markdown page that is written again after each of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import table

Record = Mapping[str, object]


@dataclass(frozen=True)
class Target:
    """What the project aims at on an H100 or H200.

    Args:
        name: in the table.
        goal: smallest value that meets it.
        parts: beginning of the names of parts that measure it.
        figure: name of their figure; the best of them counts.
    """

    name: str
    goal: float
    parts: str
    figure: str


TARGETS = (
    Target("training MFU, d20 shape", 0.5, "train-", "mfu"),
    Target("decoding, batch 1: share of the bandwidth", 0.6, "decode-1", "share_of_bandwidth"),
    Target("tokens/s relative to nano-vllm's", 0.9, "offline", "share_of_nano_vllm"),
)


class Records:
    """Results of one machine in ``gpu-<name>.jsonl``, and the page ``gpu-<name>.md`` made of them.

    Args:
        folder: of both files.
        name: of the machine.
        origin: hardware, versions, commit and date, which each record gets.
    """

    def __init__(self, folder: Path, name: str, origin: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.lines, self.page, self.origin = folder / f"gpu-{name}.jsonl", folder / f"gpu-{name}.md", dict(origin)

    def append(self, **record: object) -> None:
        """Append a record, and write the page again."""
        with self.lines.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**record, **self.origin}) + "\n")
        self.page.write_text(page(self.read()), encoding="utf-8")

    def read(self) -> list[Record]:
        """All records, of earlier runs as well. A line that a kill cut off is left out."""
        records = []
        for line in self.lines.read_text(encoding="utf-8").splitlines() if self.lines.exists() else []:
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
        return records

    def finished(self) -> set[str]:
        """Names of the parts whose last run was ok, at the same commit and with the same versions and hardware."""
        same = [name for name in self.origin if name != "date"]
        last = {record["part"]: record for record in self.read() if "status" in record}
        return {
            str(part)
            for part, record in last.items()
            if record["status"] == "ok" and all(record.get(name) == self.origin[name] for name in same)
        }


def page(records: Sequence[Record]) -> str:
    """The page: targets, then each part's last run."""
    runs = last_runs(records)
    parts = [_part(name, run) for name, run in runs.items()]
    heading = "# GPU benchmark\n\nWritten by `python -m benchmarks.gpu` (docs/gpu.md). The last run of each part counts."
    return "\n\n".join([heading, "## Targets", targets_table(records), *parts]) + "\n"


def last_runs(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each part's last run, in the order of the first runs: it begins at the record with ``begins``."""
    runs: dict[str, list[Record]] = {}
    for record in records:
        name = str(record["part"])
        if record.get("begins") or name not in runs:
            runs[name] = []
        runs[name].append(record)
    return runs


def targets_table(records: Sequence[Record]) -> str:
    """Each target: met, not met or not measured, with the best figure and its part. Figures of a CPU measure none."""
    rows = []
    for target in TARGETS:
        figures = [
            (value, name)
            for name, run in last_runs(records).items()
            if name.startswith(target.parts)
            for record in run
            if isinstance(result := record.get("result"), Mapping) and record.get("kind") == "cuda"
            if isinstance(value := result.get(target.figure), float)
        ]
        best, part = max(figures, default=(None, ""))
        state = "not measured" if best is None else "met" if best >= target.goal else "not met"
        rows.append([target.name, f"{target.goal:.0%}", "" if best is None else f"{best:.1%} ({part})", state])
    return table(["target", "at least", "best", ""], rows)


def _part(name: str, run: Sequence[Record]) -> str:
    end = next((record for record in run if "status" in record), None)
    state = "running" if end is None else _state(end)
    lines = [f"## {name}", f"{state}; {_origin(run[-1])}"]
    results = [result for record in run if isinstance(result := record.get("result"), Mapping)]
    lines += _tables(results)
    if end is not None and end["status"] in ("failed", "timed out"):
        output = end.get("output")
        lines.append("```text\n" + "\n".join(map(str, output if isinstance(output, list) else [])) + "\n```")
    return "\n\n".join(lines)


def _state(end: Record) -> str:
    words = [str(end["status"]), f"{end['seconds']} s" if "seconds" in end else "", str(end.get("reason", ""))]
    return ", ".join(filter(None, words))


def _origin(record: Record) -> str:
    return ", ".join(f"{name} {record[name]}" for name in ("device", "torch", "deepspeed", "commit", "date") if name in record)


def _tables(results: Sequence[Record]) -> list[str]:
    """One table for consecutive results with the same figures; a single result as a list."""
    groups: list[list[Record]] = []
    for result in results:
        if groups and groups[-1][0].keys() == result.keys():
            groups[-1].append(result)
        else:
            groups.append([result])
    return [_table(group) if len(group) > 1 else _list(group[0]) for group in groups]


def _table(group: Sequence[Record]) -> str:
    return table(list(group[0]), [[_cell(value) for value in result.values()] for result in group])


def _list(result: Record) -> str:
    return "\n".join(f"- {name}: {_cell(value)}" for name, value in result.items())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
