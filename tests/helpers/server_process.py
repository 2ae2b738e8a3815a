"""A server in its own process, for tests."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from helpers.processes import start

TIMEOUT = 60  # seconds


class Running:
    """A running server: its process, its output, and requests to it.

    Args:
        process: ``bumblebee serve``.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()
        self.url = re.search(r"http://[^ ,]+", self.line("loading "))[0]
        self.http = httpx.Client(base_url=self.url, timeout=TIMEOUT, headers={"Authorization": "Bearer key"})

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def line(self, begin: str, count: int = 1) -> str:
        """Wait until ``count`` lines start like this; returns the first one."""
        wait_for(lambda: self.count(begin) >= count or self.process.poll() is not None, f"a line {begin!r}", self.output)
        assert self.count(begin) >= count, self.output()
        return next(line for line in self.lines if line.startswith(begin))

    def count(self, begin: str) -> int:
        return sum(line.startswith(begin) for line in self.lines)

    def output(self) -> str:
        """The output so far."""
        return "\n".join(self.lines)

    @property
    def workers(self) -> list[psutil.Process]:
        """The worker processes."""
        return [child for child in self.children if any("spawn_main" in word for word in child.cmdline())]

    @property
    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def complete(self, prompt: str = "Hello", **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", completion(prompt, **fields))

    @contextmanager
    def stream(self, prompt: str = "Hello", **fields: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """Stream a completion; yields its chunks."""
        body = completion(prompt, stream=True, **fields)
        with self.http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            yield events(response.iter_lines())

    def metric(self, name: str) -> float:
        """A value of /metrics, summed over its labels."""
        values = re.findall(rf"^{name}(?:\{{.*\}})? (.+)$", self.http.get("/metrics").text, re.MULTILINE)
        assert values, name
        return sum(map(float, values))

    def wait_for_metric(self, name: str, value: float) -> None:
        wait_for(lambda: self.metric(name) == value, f"{name} {value}", self.output)

    def end(self, timeout: float = 30) -> int:
        """Wait for the process; returns its exit code."""
        return self.process.wait(timeout)


def completion(prompt: str = "Hello", **fields: Any) -> dict[str, Any]:
    return {"model": "bumblebee", "prompt": prompt, **fields}


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The data of server-sent events, up to [DONE]."""
    for line in lines:
        if line == "data: [DONE]":
            return
        if line:
            yield json.loads(line.removeprefix("data: "))


def wait_for(holds: Callable[[], bool], what: str, output: Callable[[], str] = str, seconds: float = TIMEOUT) -> None:
    """Wait until a condition holds; fails after a timeout."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"timed out waiting for {what}\n{output()}"
        time.sleep(0.02)


@contextmanager
def serving(folder: Path | str, *words: str, ready: bool = True, **options: Any) -> Iterator[Running]:
    """Run ``bumblebee serve`` on a free port; stops it and its child processes afterwards.

    Args:
        folder: model folder.
        words: additional options.
        ready: wait until the server is ready.
        options: of the process, such as its working directory.
    """
    words = ("--model", str(folder), "--port", "0", "--device", "cpu", *words)
    process = start(["-m", "bumblebee", "serve", *words], stderr=subprocess.STDOUT, **options)
    started: list[psutil.Process] = []
    try:
        running = Running(process)
        if ready:
            running.line("ready: ")
        yield running
    finally:
        if process.poll() is None:
            started = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
        for child in psutil.wait_procs(started, timeout=10)[1]:
            child.kill()
