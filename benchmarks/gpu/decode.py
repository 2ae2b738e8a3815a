"""Decoding of the 1.5B shape with random bf16 weights: time of an engine step, and its share of the memory bandwidth.

    python -m benchmarks.gpu.decode --device cuda --batch 8

A step must read all weights and the keys and values of all sequences; the share is of the data sheet's bandwidth, or of a
copy's where the GPU is not in the table. Prefill is not timed. Steps end when the engine returns its tokens.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.results import report
from benchmarks.gpu.shapes import DECODE, DecodeShape, save_model_folder

if TYPE_CHECKING:
    from bumblebee import BumblebeeConfig, Generator
    from bumblebee.inference.engine import GenerationEngine

# GB/s from NVIDIA's data sheets. An entry matches device names with all its words; the first match counts.
BANDWIDTHS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("H200",), 4800.0),
    (("H100", "NVL"), 3900.0),
    (("H100", "PCIe"), 2000.0),
    (("H100",), 3350.0),
    (("A100", "SXM4", "80GB"), 2039.0),
    (("A100", "SXM4", "40GB"), 1555.0),
    (("L40S",), 864.0),
    (("L4",), 300.0),
)


def bandwidth(device: str) -> tuple[float, str]:
    """Bytes per second, and whether they are from the data sheet or measured."""
    if device == "cuda":
        words = torch.cuda.get_device_name().replace("-", " ").split()
        known = next((rate for entry, rate in BANDWIDTHS if set(entry) <= set(words)), None)
        if known is not None and "MIG" not in words:
            return known * 1e9, "data sheet"
    from benchmarks.kernels.harness import measure_peaks

    return measure_peaks(torch.device(device), torch.bfloat16).bytes, "measured copy"


def main(device: str, batch: int, temperature: float) -> None:
    from bumblebee import Generator
    from bumblebee.inference.engine_config import EngineConfig

    shape = DECODE[device]
    with tempfile.TemporaryDirectory() as folder:
        config = save_model_folder("1.5b", device, Path(folder))
        generator = Generator.from_pretrained(folder, device=device)
    length = shape.context + shape.warm_up + shape.steps + 16
    engine = generator.engine(EngineConfig(cache_tokens=batch * (length + 16), max_running=batch, step_tokens=8192))
    prefill(engine, config, batch, shape, temperature)
    seconds = step_seconds(engine, shape)
    median, rate = statistics.median(seconds), bandwidth(device)
    bytes_read = bytes_of_step(generator, config, batch, shape.context + shape.warm_up + shape.steps // 2)
    report(
        batch=batch, context=shape.context, temperature=temperature, step_ms=1e3 * median, slowest_step_ms=1e3 * max(seconds),
        tokens_per_s=batch / median, gb_per_step=bytes_read / 1e9, share_of_bandwidth=bytes_read / median / rate[0],
        bandwidth_gb_per_s=rate[0] / 1e9, bandwidth=rate[1],
    )  # fmt: skip


def prefill(engine: GenerationEngine, config: BumblebeeConfig, batch: int, shape: DecodeShape, temperature: float) -> None:
    """Submit the prompts and step until every sequence has its first token."""
    from bumblebee import SamplingParams
    from bumblebee.inference.request import EngineRequest

    params = SamplingParams(max_new_tokens=shape.warm_up + shape.steps + 16, temperature=temperature, ignore_eos=True)
    for number in range(batch):
        prompt = random.Random(number).choices(range(config.vocab_size), k=shape.context)
        engine.submit(EngineRequest(str(number), prompt, params))
    started: set[str] = set()
    while len(started) < batch:
        started.update(output.id for output in engine.step() if output.tokens)


def step_seconds(engine: GenerationEngine, shape: DecodeShape) -> list[float]:
    """Seconds of the timed steps. A step's tokens are on the host when it returns, so it has waited for the device."""
    for _ in range(shape.warm_up):
        engine.step()
    seconds = []
    for _ in range(shape.steps):
        began = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - began)
    return seconds


def bytes_of_step(generator: Generator, config: BumblebeeConfig, batch: int, length: int) -> float:
    """Bytes that a step reads at least: the weights (of an embedding that is not the head only a row), keys and values."""
    weights = sum(parameter.nbytes for parameter in generator.model.parameters())
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size * 2
    return weights + batch * length * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", choices=["cpu", "cuda"], required=True)
    arguments.add_argument("--batch", type=int, default=1)
    arguments.add_argument("--temperature", type=float, default=0.0)
    chosen = arguments.parse_args()
    sys.exit(main(chosen.device, chosen.batch, chosen.temperature))
