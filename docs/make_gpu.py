"""Write the memory table in gpu.md: memory per GPU as ``bumblebee preview --gpu`` estimates it.

Run by ``make docs``. ``tests/test_memory_table.py`` fails if the table is out of date.
"""

from __future__ import annotations

import re
from pathlib import Path

from bumblebee import Bumblebee, BumblebeeConfig
from bumblebee.config import PRESETS
from bumblebee.lora import LoRA
from bumblebee.models.load_context import shapes_only
from bumblebee.preview.memory_estimate import BatchShape, ModelSize, TrainingSetup, estimate_memory
from bumblebee.transforms import ActivationCheckpointing

PAGE = Path(__file__).with_name("gpu.md")
BEGIN, END = "<!-- memory: written by make docs -->\n", "<!-- end of memory -->"
LENGTH = 4096
COLUMNS = {
    "fp32, 1 GPU": TrainingSetup("fp32", 0, 1, "cuda"),
    "bf16, 1 GPU, stage 1": TrainingSetup("bf16", 1, 1, "cuda"),
    "bf16, 8 GPUs, stage 1": TrainingSetup("bf16", 1, 8, "cuda"),
    "stage 2": TrainingSetup("bf16", 2, 8, "cuda"),
    "stage 3": TrainingSetup("bf16", 3, 8, "cuda"),
    "64 GPUs, stage 3": TrainingSetup("bf16", 3, 64, "cuda"),
}
ADAPTERS = {
    "LoRA, bf16, 1 GPU, stage 1": TrainingSetup("bf16", 1, 1, "cuda"),
    "LoRA, 8 GPUs, stage 3": TrainingSetup("bf16", 3, 8, "cuda"),
}


def size(name: str, lora: bool) -> ModelSize:
    """Size of a preset with activation checkpointing, built without weights."""
    with shapes_only():
        model = Bumblebee(BumblebeeConfig.preset(name))
        if lora:
            model.source = Path(".")  # adapters name the folder of their model; here nothing is saved
            LoRA()(model)
    ActivationCheckpointing()(model)
    return ModelSize.of(model)


def gigabytes(count: float) -> str:
    """Format as in 1.9, 23, 1,060."""
    return f"{count / 1e9:,.1f}" if count < 10e9 else f"{count / 1e9:,.0f}"


def table() -> str:
    """GB per GPU, one row per preset."""
    batch = BatchShape(1, LENGTH, LENGTH, "flash")
    lines = [["size", "parameters", *COLUMNS, *ADAPTERS]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for name in PRESETS:
        whole, adapted = size(name, lora=False), size(name, lora=True)
        row = [gigabytes(estimate_memory(whole, setup, batch).total) for setup in COLUMNS.values()]
        row += [gigabytes(estimate_memory(adapted, setup, batch).total) for setup in ADAPTERS.values()]
        lines.append([name, f"{whole.parameters:,}", *row])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(text: str) -> str:
    """Return the page with a new table."""
    return re.sub(f"(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", lambda _: "\n" + table() + "\n", text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
