"""A server in a process of its own, as the tests see it."""

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

PATIENCE = 60  # seconds


class Running:
    """A server: its process, what it has written, and ways to ask it.

    Args:
        process: ``bumblebee serve``.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()
        self.url = re.search(r"http://[^ ,]+", self.line("loading "))[0]
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE, headers={"Authorization": "Bearer key"})

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def line(self, begin: str, count: int = 1) -> str:
        """The line that begins so, once it has been written ``count`` times."""
        wait_for(lambda: self.count(begin) >= count or self.process.poll() is not None, f"a line {begin!r}", self.told)
        assert self.count(begin) >= count, self.told()
        return next(line for line in self.lines if line.startswith(begin))

    def count(self, begin: str) -> int:
        return sum(line.startswith(begin) for line in self.lines)

    def told(self) -> str:
        """All that it has written."""
        return "\n".join(self.lines)

    @property
    def workers(self) -> list[psutil.Process]:
        """The processes with the model."""
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
        """The chunks of a completion that is streamed."""
        body = completion(prompt, stream=True, **fields)
        with self.http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            yield events(response.iter_lines())

    def metric(self, name: str) -> float:
        """A figure of /metrics, summed over its labels."""
        found = re.findall(rf"^{name}(?:\{{.*\}})? (.+)$", self.http.get("/metrics").text, re.MULTILINE)
        assert found, name
        return sum(map(float, found))

    def wait_for_metric(self, name: str, value: float) -> None:
        wait_for(lambda: self.metric(name) == value, f"{name} {value}", self.told)

    def end(self, timeout: float = 30) -> int:
        """Wait for its exit code."""
        return self.process.wait(timeout)


def completion(prompt: str = "Hello", **fields: Any) -> dict[str, Any]:
    return {"model": "bumblebee", "prompt": prompt, **fields}


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The objects of server-sent events, up to [DONE]."""
    for line in lines:
        if line == "data: [DONE]":
            return
        if line:
            yield json.loads(line.removeprefix("data: "))


def wait_for(holds: Callable[[], bool], what: str, told: Callable[[], str] = str, seconds: float = PATIENCE) -> None:
    """Until something holds; the test fails if it takes too long."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"{what} did not come\n{told()}"
        time.sleep(0.02)


@contextmanager
def serving(folder: Path | str, *words: str, ready: bool = True, **options: Any) -> Iterator[Running]:
    """``bumblebee serve`` on a free port; it is gone afterwards, and so is whatever it has started.

    Args:
        folder: the model's.
        words: further options.
        ready: wait until it answers.
        options: of the process, such as the folder it is started in.
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
