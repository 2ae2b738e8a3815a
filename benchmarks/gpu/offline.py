"""nano-vllm's benchmark: 256 requests of 100 to 1,024 tokens, each with 100 to 1,024 new ones, on the Qwen3-0.6B shape.

    python -m benchmarks.gpu.offline --device cuda

Random weights; temperature 0.6, no end token. nano-vllm runs the same requests on the same folder, if it can be imported, in
a process of its own, after ours has freed the GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.gpu.results import RESULT, report
from benchmarks.gpu.shapes import OFFLINE, OfflineShape, save_model_folder

TEMPERATURE = 0.6
VOCABULARY = {"cuda": 10_000, "cpu": 500}  # ids of prompts are below it


def requests(shape: OfflineShape, vocabulary: int) -> list[tuple[list[int], int]]:
    """(prompt, number of new tokens) of each request, the same for both engines."""
    rng = random.Random(0)
    return [
        ([rng.randrange(vocabulary) for _ in range(rng.randint(shape.shortest, shape.longest))],
         rng.randint(shape.shortest, shape.longest))
        for _ in range(shape.requests)
    ]  # fmt: skip


def bumblebee_seconds(folder: str, device: str) -> float:
    """Seconds of all requests with Bumblebee's engine, after a short warm-up."""
    from bumblebee import Generator, SamplingParams
    from bumblebee.inference.engine_config import EngineConfig
    from bumblebee.inference.request import EngineRequest

    shape = OFFLINE[device]
    engine = Generator.from_pretrained(folder, device=device).engine(
        EngineConfig(
            cache_tokens=None if device == "cuda" else 2 * shape.requests * (shape.longest + 16),
            max_running=256,
            step_tokens=16384,
        )
    )

    def run(prefix: str, several: list[tuple[list[int], int]]) -> int:
        for number, (prompt, new) in enumerate(several):
            params = SamplingParams(max_new_tokens=new, temperature=TEMPERATURE, ignore_eos=True)
            engine.submit(EngineRequest(f"{prefix}{number}", prompt, params))
        tokens = 0
        while engine.busy:
            tokens += sum(len(output.tokens) for output in engine.step())
        return tokens

    every = requests(shape, VOCABULARY[device])
    run("warm-up ", [(prompt[::-1], 4) for prompt, _ in every[:2]])  # reversed, so that nothing is in the prefix cache
    began = time.perf_counter()
    tokens = run("", every)
    assert tokens == sum(new for _, new in every), "a request ended early"
    return time.perf_counter() - began


def nano_vllm_seconds(folder: str, device: str) -> float:
    """Seconds of the same requests with nano-vllm."""
    from nanovllm import LLM, SamplingParams

    every = requests(OFFLINE[device], VOCABULARY[device])
    engine = LLM(folder, enforce_eager=False, max_model_len=4096)
    engine.generate([prompt[::-1] for prompt, _ in every[:2]], SamplingParams(temperature=TEMPERATURE, max_tokens=4))
    params = [SamplingParams(temperature=TEMPERATURE, ignore_eos=True, max_tokens=new) for _, new in every]
    began = time.perf_counter()
    engine.generate([prompt for prompt, _ in every], params, use_tqdm=False)
    torch.cuda.synchronize()
    return time.perf_counter() - began


ENGINES = {"bumblebee": bumblebee_seconds, "nano-vllm": nano_vllm_seconds}


def in_process(engine: str, folder: str, device: str) -> float | str:
    """Seconds of an engine in a process of its own, which frees the GPU at its end; or why it did not run."""
    words = [sys.executable, "-m", "benchmarks.gpu.offline", "--device", device, "--engine", engine, "--folder", folder]
    done = subprocess.run(words, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode == 0 and lines:
        return float(json.loads(lines[-1].removeprefix(RESULT))["seconds"])
    return next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit code {done.returncode}")


def main(device: str) -> int:
    """Run both engines; fails only if Bumblebee's does."""
    new_tokens = sum(new for _, new in requests(OFFLINE[device], VOCABULARY[device]))
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_model_folder("qwen3-0.6b", device, Path(folder))
        if device == "cuda":
            torch.cuda.empty_cache()
        for engine in ENGINES:
            outcome = in_process(engine, folder, device)
            if isinstance(outcome, str):
                report(engine=engine, not_run=outcome)
            else:
                rates[engine] = new_tokens / outcome
                report(engine=engine, requests=OFFLINE[device].requests, new_tokens=new_tokens, seconds=outcome,
                       tokens_per_s=rates[engine])  # fmt: skip
    if len(rates) == 2:
        report(share_of_nano_vllm=rates["bumblebee"] / rates["nano-vllm"])
    return int("bumblebee" not in rates)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", choices=["cpu", "cuda"], required=True)
    arguments.add_argument("--engine", choices=list(ENGINES), help="used by the script itself")
    arguments.add_argument("--folder", help="used by the script itself")
    chosen = arguments.parse_args()
    if chosen.engine:
        report(seconds=ENGINES[chosen.engine](chosen.folder, chosen.device))
        sys.exit()
    sys.exit(main(chosen.device))
