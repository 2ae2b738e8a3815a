"""Writes the table of memory in gpu.md: what training takes of each GPU, computed as ``bumblebee preview --gpu`` computes it.

Run by ``make docs``. ``tests/test_memory_table.py`` tells when the table is out of date.
"""

from __future__ import annotations

import re
from pathlib import Path

from bumblebee import Bumblebee, BumblebeeConfig
from bumblebee.checkpoint.hf_folder import shapes_only
from bumblebee.config import PRESETS
from bumblebee.lora import LoRA
from bumblebee.preview.memory_estimate import MicroBatch, ModelSize, Setup, estimate
from bumblebee.transforms import ActivationCheckpointing

PAGE = Path(__file__).with_name("gpu.md")
BEGIN, END = "<!-- memory: written by make docs -->\n", "<!-- end of memory -->"
LENGTH = 4096
COLUMNS = {
    "fp32, 1 GPU": Setup("fp32", 0, 1, "cuda"),
    "bf16, 1 GPU, stage 1": Setup("bf16", 1, 1, "cuda"),
    "bf16, 8 GPUs, stage 1": Setup("bf16", 1, 8, "cuda"),
    "stage 2": Setup("bf16", 2, 8, "cuda"),
    "stage 3": Setup("bf16", 3, 8, "cuda"),
    "64 GPUs, stage 3": Setup("bf16", 3, 64, "cuda"),
}
ADAPTERS = {"LoRA, bf16, 1 GPU, stage 1": Setup("bf16", 1, 1, "cuda"), "LoRA, 8 GPUs, stage 3": Setup("bf16", 3, 8, "cuda")}


def size(name: str, lora: bool) -> ModelSize:
    """Of a published shape, with activations computed again, built without weights."""
    with shapes_only():
        model = Bumblebee(BumblebeeConfig.preset(name))
        if lora:
            model.source = Path(".")  # adapters name the folder of their model; here nothing is saved
            LoRA()(model)
    ActivationCheckpointing()(model)
    return ModelSize.of(model)


def gigabytes(found: float) -> str:
    """As in a table: 1.9, 23, 1,060."""
    return f"{found / 1e9:,.1f}" if found < 10e9 else f"{found / 1e9:,.0f}"


def table() -> str:
    """GB of each GPU, a line for each size."""
    batch = MicroBatch(1, LENGTH, LENGTH, "flash")
    lines = [["size", "parameters", *COLUMNS, *ADAPTERS]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for name in PRESETS:
        whole, adapted = size(name, lora=False), size(name, lora=True)
        row = [gigabytes(estimate(whole, setup, batch).total) for setup in COLUMNS.values()]
        row += [gigabytes(estimate(adapted, setup, batch).total) for setup in ADAPTERS.values()]
        lines.append([name, f"{whole.parameters:,}", *row])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(text: str) -> str:
    """The page with the table in its place."""
    return re.sub(f"(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", lambda _: "\n" + table() + "\n", text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
