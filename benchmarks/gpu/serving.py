"""Throughput of ``bumblebee serve`` on the Qwen3-0.6B shape: streamed completions, so many at a time.

    python -m benchmarks.gpu.serving --device cuda

Prompts of token ids without common prefixes; greedy; TTFT is the time to the first token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.gpu.results import report
from benchmarks.gpu.shapes import SERVING, ServingShape, save_model_folder

VOCABULARY = 300  # ids of prompts are below it, which are those of the tokenizer
READY = 180.0  # seconds until the server answers


@contextmanager
def server(folder: str, device: str) -> Iterator[str]:
    """Start the server, wait until it is ready, and yield its address.

    Raises:
        RuntimeError: it exited, or was not ready in time.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    words = [sys.executable, "-m", "bumblebee", "serve", "--model", folder, "--port", str(port), "--device", device]
    process = subprocess.Popen(words, stdout=sys.stderr)
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(address: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + READY
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"bumblebee serve exited with code {process.returncode}")
        try:
            if httpx.get(f"{address}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise RuntimeError(f"bumblebee serve was not ready after {READY:.0f} s")


async def complete(client: httpx.AsyncClient, address: str, prompt: list[int], new: int) -> tuple[float, int]:
    """Send one request; returns (seconds to the first token, number of new tokens)."""
    body = {
        "model": "bumblebee", "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, first, tokens = time.perf_counter(), 0.0, 0
    async with client.stream("POST", f"{address}/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {(await response.aread()).decode()[:300]}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                first = first or time.perf_counter() - began
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    return first, tokens


async def load(address: str, shape: ServingShape, concurrent: int, seed: int) -> tuple[float, list[tuple[float, int]]]:
    """Send requests at the same time; returns (seconds until all are complete, outcome of each)."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(VOCABULARY) for _ in range(shape.prompt)] for _ in range(concurrent)]
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        began = time.perf_counter()
        outcomes = await asyncio.gather(*(complete(client, address, prompt, shape.new) for prompt in prompts))
        return time.perf_counter() - began, list(outcomes)


def main(device: str) -> None:
    shape = SERVING[device]
    with tempfile.TemporaryDirectory() as folder:
        save_model_folder("qwen3-0.6b", device, Path(folder))
        with server(folder, device) as address:
            asyncio.run(load(address, shape, max(shape.concurrent), seed=0))  # warm-up
            for seed, concurrent in enumerate(shape.concurrent, start=1):
                seconds, outcomes = asyncio.run(load(address, shape, concurrent, seed))
                tokens = sum(count for _, count in outcomes)
                report(
                    concurrent=concurrent, prompt_tokens=shape.prompt, new_tokens=tokens, seconds=seconds,
                    tokens_per_s=tokens / seconds, ttft_ms=1e3 * statistics.median(first for first, _ in outcomes),
                )  # fmt: skip


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", choices=["cpu", "cuda"], required=True)
    sys.exit(main(arguments.parse_args().device))
